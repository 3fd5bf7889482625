"""A `JsonCallParser` parses a section of tool calls whose arguments are a JSON object, in the form of one dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping

from services.gateway.chat.dialects.call_parser import CallParser, IsMarker
from services.gateway.chat.dialects.json_call_form import JsonCallForm, Part, Slot
from services.gateway.chat.dialects.json_object_text import JsonObjectText
from services.gateway.chat.markers import Marker
from services.gateway.chat.tool_call_delta import ToolCallDelta, new_call
from services.gateway.chat.tools import Tool
from services.gateway.schema.json_text import loads, nearest_float

NAME_RUN = re.compile(r"[a-zA-Z0-9_.-]*")  # the characters that names of tools may have
SPACE = re.compile(r"\s*")


class JsonCallParser(CallParser):
    """A `JsonCallParser` parses one section of calls, beginning with the text after its marker.

    The arguments are passed on as the model wrote them; see `JsonObjectText`. White space around all parts of a call
    is ignored. A call whose arguments are no JSON object is broken. If a grammar enforces calls (`is_forced`), the JSON
    is not checked again, because the check refuses objects that are nested too deep.

    The parser holds all orders of parts that fit the text up to now (`_orders`), the index of the current part, and
    the number of characters of this part that were read. The end of a section is an order of one part.
    """

    def __init__(
        self, form: JsonCallForm, tools: Mapping[str, Tool], index: int, is_forced: bool, is_marker: IsMarker
    ) -> None:
        super().__init__(form.calls_start.text, index)
        self._form, self._tools, self._is_forced, self._is_marker = form, tools, is_forced, is_marker
        self._begin_call()

    def _begin_call(self) -> None:
        self._orders = [self._form.call, *self._form.others]
        if self._form.calls_end is not None:
            self._orders.append((self._form.calls_end,))
        self._begin_part(0)

    def _begin_part(self, part: int) -> None:
        self._part, self._num_read = part, 0
        self._text = list[str]()  # the pieces of the name or of the arguments
        self._object = JsonObjectText()

    @property
    def _current(self) -> Part:
        """Return the current part, which is the same in all orders unless all of them are words or markers."""
        return self._orders[0][self._part]

    def _parse(self, text: str) -> str:
        before = self.num_calls
        while text and not (self.is_whole or self.is_broken or self.num_calls > before):
            match self._current:
                case Slot.NAME:
                    text = self._parse_name(text)
                case Slot.ARGUMENTS:
                    text = self._parse_arguments(text)
                case _:
                    text = self._parse_word(text)
        return "" if self.is_broken else text

    def _parse_word(self, text: str) -> str:
        """Read characters of a word or marker, up to its end. White space in words and before markers is ignored."""
        position = 0
        while position < len(text):
            current = self._current
            if isinstance(current, str) or not self._num_read:
                position = _after_space(text, position)
                if position == len(text):
                    break
            orders = [order for order in self._orders if _char(order[self._part], self._num_read) == text[position]]
            if not orders:
                self.is_broken = True
                return ""
            self._orders = orders
            self._num_read, position = self._num_read + 1, position + 1
            if self._num_read == len(_spelling(self._current)):
                return self._end_word(text[position:])
        return ""

    def _end_word(self, rest: str) -> str:
        part = self._current
        if isinstance(part, Marker) and not self._is_marker(part, rest):
            self.is_broken = True
        elif part == self._form.calls_end:
            self.is_whole = True
        elif self._part + 1 < len(self._orders[0]):
            self._begin_part(self._part + 1)
        else:
            self.num_calls += 1
            self.is_whole = self._form.calls_end is None
            self._begin_call()
        return rest

    def _parse_name(self, text: str) -> str:
        if not self._text:
            text = text.lstrip()
        run = NAME_RUN.match(text)
        assert run is not None
        if run[0]:
            self._text.append(run[0])
        rest = text[run.end() :]
        if rest:
            self._open("".join(self._text))
        return rest

    def _open(self, name: str) -> None:
        if name not in self._tools:
            self.is_broken = True
            return
        # If the arguments stand before the name, their pieces are already in the list.
        self._deltas.insert(0, new_call(self._index + self.num_calls, name))
        self._begin_part(self._part + 1)

    def _parse_arguments(self, text: str) -> str:
        if not self._text:
            text = text.lstrip()
            if text and text[0] != "{":
                self.is_broken = True
                return ""
        shown, rest = self._object.push(text)
        if shown:
            self._text.append(shown)
            self._deltas.append(ToolCallDelta(self._index + self.num_calls, "", "", shown))
        if self._object.is_whole:
            self.is_broken = not (self._is_forced or _is_json("".join(self._text)))
            self._begin_part(self._part + 1)
        return rest


def _spelling(part: Part) -> str:
    """Return the characters of a word or marker by which the part is found: a word without its white space."""
    assert not isinstance(part, Slot)
    return part.text if isinstance(part, Marker) else "".join(part.split())


def _char(part: Part, position: int) -> str:
    return _spelling(part)[position]


def _after_space(text: str, position: int) -> int:
    space = SPACE.match(text, position)
    assert space is not None
    return space.end()


def _is_json(text: str) -> bool:
    try:
        loads(text, _refuse, nearest_float)
    except ValueError:
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)  # json.loads would accept NaN and Infinity, which are not JSON
