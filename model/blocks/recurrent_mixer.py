"""A `RecurrentMixer` is a layer whose state sums up all earlier tokens of a request, such as Mamba-2.

The layer consists of input projections, a core and an output projection. The core is a causal convolution over the
last K tokens, followed by a recurrence.

If a step verifies drafts, the state of the requests with drafts does not change in the step. The layer keeps the inputs
of its core until `commit`, which runs the core again over the accepted tokens. Keeping a copy of the state before each
draft instead would need (1 + drafts) times the memory of the state.

Legend: T tokens of the step, U tokens of requests with drafts, R requests, I inner dim, K taps, C conv channels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.blocks.mixer import Mixer
from model.cpu import layers as cpu_layers
from model.cpu.thread_pool import THREAD_POOL
from model.state import Batch, State

Floats = NDArray[np.float32]
Inputs = tuple[Floats, ...]  # outputs of the input projections, each (T, columns)


class ConvWeights(nn.Module):
    """`ConvWeights` holds the convolution's parameters under the checkpoint's names: weight (C, 1, K), bias (C,)."""

    def __init__(self, num_channels: int, num_taps: int, use_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, num_taps))
        self.bias = nn.Parameter(torch.empty(num_channels)) if use_bias else None


class RecurrentMixer(Mixer):
    """A `RecurrentMixer` maps (T, hidden) -> (T, hidden) and advances the requests' recurrent state.

    A subclass sets `output_params`, the parameters of the output projection, in `pack`. It sets `has_packed_core` if
    the CPU kernels support the shape of its core. Otherwise only the projections run on the CPU kernels.
    """

    has_packed_core = False
    output_params: tuple[Any, ...] = ()

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @abstractmethod
    def project(self, h_TD: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the input projections, in plain PyTorch."""

    @abstractmethod
    def project_packed(self, control: Any, num_threads: int, x: Floats) -> Inputs:
        """Return the outputs of the input projections of norm(x), computed by the CPU kernels."""

    @abstractmethod
    def output(self, mixed_TI: Tensor) -> Tensor:
        """Return the output projection of the core's outputs, in plain PyTorch."""

    @abstractmethod
    def mix_packed(self, inputs: Inputs, batch: Batch, state: State, has_output: bool = True) -> Floats:
        """Compute the core with the CPU kernels, advance the state, and return the outputs (T, I).

        If `has_output` is False, compute only the state.
        """

    @abstractmethod
    def mix_from(
        self, inputs: tuple[Tensor, ...], window_RKC: Tensor, state_R: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the core without the CPU kernels; return the outputs (T, I) and the new state.

        The state is the convolution's last K-1 inputs, `window_RKC`, and the state of the recurrence.
        """

    def kernel_state(self, batch: Batch, state: State) -> tuple[Any, ...]:
        """Return the arguments of a core's CPU kernel from `starts_R` to the recurrence's state, in their order."""
        arrays, (windows, states) = batch.arrays, state.slots[self.layer]
        is_bf16 = windows.dtype == torch.bfloat16
        window = (windows.view(torch.int16) if is_bf16 else windows).numpy()
        requests = (arrays.starts_R, arrays.lens_R, arrays.slots_R, arrays.is_new_R, arrays.keeps_R)
        return *requests, window, is_bf16, states.numpy()

    @abstractmethod
    def round_inputs(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the core's inputs; the inputs of the convolution are rounded to `dtype`, the window's dtype."""

    def replay_inputs(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the part of the core's inputs on which the new state depends; the other inputs are not kept."""
        return inputs

    def add_to(self, x_TD: Tensor, batch: Batch, state: State) -> None:
        """Compute x += mixer(norm(x)) in place with the CPU kernels."""
        num_threads, x = torch.get_num_threads(), x_TD.numpy()
        control = THREAD_POOL.start_workers(num_threads)
        inputs = self.project_packed(control, num_threads, x)
        if batch.has_drafts:
            rows = batch.draft_rows.numpy()
            state.uncommitted[self.layer] = self.replay_inputs(tuple(part[rows] for part in inputs))
        mix = self.mix_packed if self.has_packed_core else self._mix_token_by_token
        mixed_TI = mix(inputs, batch, state)
        cpu_layers.add_projected(control, num_threads, mixed_TI, *self.output_params, x)

    def forward(self, h_TD: Tensor, batch: Batch, state: State) -> Tensor:
        inputs = self.project(h_TD)
        if batch.has_drafts:
            kept = tuple(part[batch.draft_rows] for part in inputs)
            state.uncommitted[self.layer] = self.replay_inputs(kept)
        return self.output(self._mix(inputs, batch, state))

    def commit(self, places: Tensor, accepted: Batch, state: State) -> None:
        """Advance the recurrent state over accepted drafts with the inputs that the step kept, as `Mixer.commit`."""
        kept = state.uncommitted.pop(self.layer)
        if isinstance(kept[0], np.ndarray):
            inputs = tuple(part[places.numpy()] for part in kept)
            if self.has_packed_core:
                self.mix_packed(inputs, accepted, state, has_output=False)
            else:
                self._mix_token_by_token(inputs, accepted, state)
        else:
            self._mix(tuple(part[places] for part in kept), accepted, state)

    def _mix(self, inputs: tuple[Tensor, ...], batch: Batch, state: State) -> Tensor:
        """Compute the core with the fused CUDA kernels if installed, otherwise with PyTorch; advance the state."""
        window_RKC, recurrent_R = state.read(self.layer, batch)
        out_TI, *values = self.mix_from(inputs, window_RKC, recurrent_R, batch)
        state.write(self.layer, batch, values)
        return out_TI

    def _mix_token_by_token(self, inputs: Inputs, batch: Batch, state: State) -> Floats:
        """Compute `mix_packed` in plain PyTorch, for shapes that the CPU kernels do not support.

        Every token is computed alone, in calls of one fixed size, and the inputs of the convolution are rounded to the
        dtype of the window in the state. So a token's bits depend only on the request's own tokens.
        """
        windows_RKC, states_R = state.read(self.layer, batch)
        one_token = Batch(batch.token_ids_T[:1], (1,), (0,), (0,), ((0,),))
        outputs, new_windows, new_states = [], [], []
        rounded = self.round_inputs(tuple(map(torch.from_numpy, inputs)), windows_RKC.dtype)
        by_request = zip(*(part.split(list(batch.lens)) for part in rounded), strict=True)
        for r, parts_of_request in enumerate(by_request):
            window, recurrent = windows_RKC[r : r + 1].float(), states_R[r : r + 1]
            for row in zip(*(part.split(1) for part in parts_of_request), strict=True):
                out, window, recurrent = self.mix_from(row, window, recurrent, one_token)
                outputs.append(out)
            new_windows.append(window)
            new_states.append(recurrent)
        state.write(self.layer, batch, (torch.cat(new_windows), torch.cat(new_states)))
        return torch.cat(outputs).float().numpy()
