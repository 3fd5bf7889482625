"""The script writes the demo model in a quantized format, and measures the written model on the held-out files.

    python -m model.demo.quantize --format fp8 OUT              # writes the model directory OUT
    python -m model.demo.quantize --format nvfp4 OUT --measure  # also prints the figures, in about ten minutes

| format     | as in                 | quantized weights                                                          |
|------------|-----------------------|----------------------------------------------------------------------------|
| fp8        | Super-FP8             | routed and shared experts and Mamba projections, one scale each            |
| fp8_blocks | DeepSeek-V3, Qwen     | every linear layer except the router, the head and `eh_proj`; also the MTP |
| nvfp4      | Super-NVFP4 (mixed)   | routed experts in NVFP4; shared experts and Mamba projections in FP8       |

The other weights keep their bf16 numbers; in `fp8` and `nvfp4`, these are also all weights of the MTP module. The
directory has the configs that public checkpoints have, but no `input_scale`, because no activations were calibrated.
`metrics.json` of the demo model has each format's figures on every third held-out file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from model.configs.declared_formats import declarations
from model.configs.model_files import CONFIG, QUANTIZATION, SINGLE, read_json
from model.configs.weight_format import FORMATS, WeightFormat
from model.demo import DEMO
from model.demo.corpus import read_corpus
from model.encoder import encode_tensors, linear_modules

MAMBA = ("in_proj", "out_proj")
BITS_PER_BYTE_BARS = {"fp8": 0.01, "fp8_blocks": 0.01, "nvfp4": 0.06}  # allowed increase over bf16 on held-out text
NEVER = ("gate", "eh_proj")  # linear layers that no public checkpoint quantizes


def formats_of(format: WeightFormat, modules: Iterable[str]) -> dict[str, WeightFormat]:
    """Return the weight format of each module that is quantized in the model directory of `format`."""
    chosen: dict[str, WeightFormat] = {}
    for module in modules:
        is_mtp, is_expert = module.startswith("mtp."), ".experts." in module
        is_wide = is_expert or ".shared_experts." in module or module.endswith(MAMBA)
        if format == "fp8_blocks" and not module.endswith(NEVER):
            chosen[module] = "fp8_blocks"
        elif format != "fp8_blocks" and is_wide and not is_mtp:
            chosen[module] = format if is_expert else "fp8"
    return chosen


def write_quantized(source: Path, out: Path, formats: Mapping[str, WeightFormat]) -> None:
    """Copy the one-file model directory `source` to `out`, with the modules in `formats` quantized."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(SINGLE, "metrics.json", QUANTIZATION))
    tensors = load_file(source / SINGLE)
    save_file(encode_tensors(tensors, formats), out / SINGLE, metadata={"format": "pt"})
    declared, hf_quant_config = declarations(formats, linear_modules(tensors))
    config = read_json(source / CONFIG) | {"quantization_config": declared}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if hf_quant_config is not None:
        (out / QUANTIZATION).write_text(json.dumps(hf_quant_config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model in a quantized format.")
    parser.add_argument("--format", choices=[format for format in FORMATS if format != "plain"], required=True)
    parser.add_argument("--measure", action="store_true", help="measure the written model on the held-out files")
    parser.add_argument("out", type=Path, help="directory to write, which must not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already; give the name of a new directory")
    modules = linear_modules(load_file(DEMO / SINGLE))
    write_quantized(DEMO, args.out, formats_of(args.format, modules))
    if args.measure:
        from model.demo.export import load_for_measuring, measure  # imports torch's compiler, which takes seconds

        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        print(json.dumps(measure(*load_for_measuring(args.out), tokenizer, read_corpus()[1]), indent=2))


if __name__ == "__main__":
    main()
