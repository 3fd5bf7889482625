"""A `SchemaRewriter` converts a JSON schema to the keywords that llguidance knows, which enforces schemas of JSON text.

What llguidance lacks is rewritten where that is exact: formats, content encodings and patterns become patterns of its
dialect, `uniqueItems` of a few values becomes a list of arrays, and so on. Annotations are left out, and of the
definitions only those are kept that the schema refers to, each once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any

from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.formats import encoding_regex, format_regex
from services.gateway.schema.negation import finite_values, negate
from services.gateway.schema.raw_text import length_of, regex_of, schemas_of
from services.gateway.schema.references import ALL_TYPES, MAX_NESTING, SchemaRoot, wrong_type
from services.gateway.schema.regex import whole_match

MAX_ARRANGEMENTS = 512  # arrays that one `uniqueItems` may become
MAX_ARRANGED = 2**16  # characters of all such arrays of one schema
MAX_DEPENDENT = 4  # properties of one dependentRequired; each doubles the number of cases
Fragment = dict[str, Any]


class SchemaRewriter:
    """A `SchemaRewriter` rewrites schemas that refer to the definitions in `root`, each of which it rewrites once.

    - `is_strict`: True: raise UnsupportedKeyword for the first keyword that cannot be expressed. False: leave it out.
    """

    def __init__(self, root: SchemaRoot, is_strict: bool) -> None:
        self._root, self._is_strict = root, is_strict
        self._num_arranged = self._depth = 0
        self._names: dict[str, str] = {}  # names of definitions, by reference
        self._definitions: dict[str, Any] = {}  # the rewritten definitions, by reference
        self._found: dict[str, dict[str, str]] = {}  # for each definition, the references in it, and their paths
        self._refers: dict[str, str] = {}  # the references in the schema that is being rewritten, and their paths
        # Each function returns what one keyword becomes. A keyword without a function is an annotation, is unknown to
        # JSON Schema, or is read together with another keyword.
        self._keywords: dict[str, Callable[[Mapping[str, Any], str], Fragment]] = {
            "type": self._type,
            "enum": self._enum,
            "const": lambda schema, path: {"const": schema["const"]},
            "pattern": lambda schema, path: _pattern(regex_of(whole_match, schema["pattern"], path)),
            "format": self._format,
            "contentEncoding": lambda schema, path: _pattern(regex_of(encoding_regex, schema["contentEncoding"], path)),
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), self._length),
            **dict.fromkeys(("minProperties", "maxProperties"), self._num_properties),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), self._bound),
            "multipleOf": self._multiple,
            "items": self._items,
            "prefixItems": self._prefix_items,
            "uniqueItems": self._unique_items,
            "required": self._required,
            "properties": self._properties,
            "patternProperties": self._pattern_properties,
            **dict.fromkeys(("additionalProperties", "unevaluatedProperties"), self._additional_properties),
            "propertyNames": self._property_names,
            **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), self._dependent),
            "$ref": self._reference,
            "allOf": self._options,
            "anyOf": self._options,
            "oneOf": self._options,
            "not": self._not,
            "if": self._if,
            **dict.fromkeys(("contains", "unevaluatedItems", "$dynamicRef", "$recursiveRef"), _unsupported),
        }

    def rewrite(self, schema: Any, path: str) -> Any:
        """Return a schema that llguidance knows, with the definitions to which it refers under `$defs`.

        `path` is the name of the schema, with which error messages begin.
        """
        found, waiting = self._with_references(schema, path)
        definitions = {}
        while waiting:
            reference, place = waiting.popitem()
            if reference not in self._definitions:
                target = self._root.resolve(reference, place)
                self._definitions[reference], self._found[reference] = self._with_references(target, reference)
            definitions[self._names[reference]] = self._definitions[reference]
            waiting |= {one: at for one, at in self._found[reference].items() if self._names[one] not in definitions}
        return found | {"$defs": definitions} if definitions else found

    def _with_references(self, schema: Any, path: str) -> tuple[Any, dict[str, str]]:
        self._refers = {}
        return self._schema(schema, path), self._refers

    def _schema(self, schema: Any, path: str) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            if self._is_strict:
                raise UnsupportedKeyword(path, f"must be a schema, not {schema!r:.100}")
            return True
        self._root.count_read(path)
        if self._depth >= MAX_NESTING:
            raise UnsupportedKeyword(path, f"stands below more than {MAX_NESTING} schemas")
        self._depth += 1
        try:
            return self._rewritten(schema, path)
        finally:
            self._depth -= 1

    def _rewritten(self, schema: Mapping[str, Any], path: str) -> Fragment:
        made: Fragment = {}
        parts: list[Fragment] = []
        for keyword in schema:
            if (convert := self._keywords.get(keyword)) is None:
                continue
            try:
                fragment = convert(schema, f"{path}.{keyword}")
            except UnsupportedKeyword:
                if self._is_strict:
                    raise
                continue
            if any(made.get(key, value) != value for key, value in fragment.items()):
                parts.append(fragment)
            else:
                made |= fragment
        if parts:
            made["allOf"] = [*made.get("allOf", []), *parts]
        return made

    def _type(self, schema: Mapping[str, Any], path: str) -> Fragment:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if schema["type"] is None:
            return {}
        if wrong := [name for name in named if not isinstance(name, str) or name not in ALL_TYPES]:
            raise UnsupportedKeyword(path, wrong_type(wrong[0]))
        return {"type": schema["type"]}

    def _enum(self, schema: Mapping[str, Any], path: str) -> Fragment:
        if not isinstance(schema["enum"], list) or not schema["enum"]:
            raise UnsupportedKeyword(path, "must be a list of at least one value")
        return {"enum": schema["enum"]}

    def _format(self, schema: Mapping[str, Any], path: str) -> Fragment:
        # OpenAPI has formats of numbers, such as int64.
        named = schema.get("type") or "string"
        is_text = "string" in (named if isinstance(named, list) else [named])
        return _pattern(regex_of(format_regex, schema["format"], path)) if is_text else {}

    def _length(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        value = length_of(schema, keyword, path)
        return {} if value is None else {keyword: value}

    def _num_properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        value, names = length_of(schema, keyword, path), _mapping(schema, "properties", path)
        required = _required_names(schema)
        is_implied = keyword == "minProperties" and value is not None and value <= len(set(required))
        if keyword == "maxProperties" and value is not None and schema.get("additionalProperties") is False:
            is_implied = value >= len(names) and not schema.get("patternProperties")
        if value is None or is_implied:
            return {}
        if not names.keys() <= set(required):
            raise UnsupportedKeyword(path, "is supported only where all keys listed in properties are required")
        return {keyword: value}

    def _bound(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        value = schema[keyword]
        if isinstance(value, bool) and keyword.startswith("exclusive"):  # draft 4: a flag that belongs to the bound
            bound = keyword.removeprefix("exclusive").lower()
            return {keyword: schema[bound]} if value and isinstance(schema.get(bound), int | float) else {}
        if value is None:
            return {}
        return {keyword: _number(value, path)}

    def _multiple(self, schema: Mapping[str, Any], path: str) -> Fragment:
        if _number(schema["multipleOf"], path) <= 0:
            raise UnsupportedKeyword(path, f"must be above 0, not {schema['multipleOf']!r}")
        return {"multipleOf": schema["multipleOf"]}

    def _items(self, schema: Mapping[str, Any], path: str) -> Fragment:
        if not isinstance(schema["items"], list):
            return {"items": self._schema(schema["items"], path)}
        # before draft 2020-12, a list of `items` meant `prefixItems`, and `additionalItems` meant `items`
        made: Fragment = {"prefixItems": self._list(schema["items"], path)}
        if "additionalItems" in schema:
            made["items"] = self._schema(schema["additionalItems"], f"{path.rpartition('.')[0]}.additionalItems")
        return made

    def _prefix_items(self, schema: Mapping[str, Any], path: str) -> Fragment:
        return {"prefixItems": self._list(schemas_of(schema, "prefixItems", path), path)}

    def _unique_items(self, schema: Mapping[str, Any], path: str) -> Fragment:
        longest = length_of(schema, "maxItems", path)
        if schema["uniqueItems"] is not True or (longest is not None and longest <= 1):
            return {}
        values = finite_values(schema.get("items"), self._root)
        if values is None or schema.get("type") != "array" or "prefixItems" in schema:
            raise UnsupportedKeyword(path, "is supported only for an array whose items are an enum")
        values = list({json.dumps(value): value for value in values}.values())
        sizes = [len(json.dumps(value)) for value in values]
        shortest = length_of(schema, "minItems", path) or 0
        longest = len(values) if longest is None else min(longest, len(values))
        arrangements: list[Any] = []
        for length in range(shortest, longest + 1):
            for arranged in permutations(range(len(values)), length):
                self._num_arranged += sum(sizes[index] for index in arranged)
                if len(arrangements) == MAX_ARRANGEMENTS or self._num_arranged > MAX_ARRANGED:
                    reason = f"is supported only where at most {MAX_ARRANGEMENTS} short arrays match"
                    raise UnsupportedKeyword(path, reason)
                arrangements.append([values[index] for index in arranged])
        if not arrangements:
            raise UnsupportedKeyword(path, "allows no array, because minItems is larger than the number of values")
        return {"enum": arrangements}

    def _required(self, schema: Mapping[str, Any], path: str) -> Fragment:
        names = _required_names(schema)
        return {"required": list(dict.fromkeys(names))} if names else {}

    def _properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        properties = _mapping(schema, "properties", path)
        made: Fragment = {"properties": {name: self._schema(one, f"{path}.{name}") for name, one in properties.items()}}
        return made if properties else {}

    def _pattern_properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        patterns = _mapping(schema, "patternProperties", path)
        made = {}
        for pattern, one in patterns.items():
            regex = regex_of(whole_match, pattern, path)
            made[_pattern(regex)["pattern"]] = self._schema(one, f"{path}.{pattern}")
        return {"patternProperties": made} if made else {}

    def _additional_properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        is_alone = not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "if", "additionalProperties", "not"}
        if keyword == "unevaluatedProperties" and not is_alone:
            raise UnsupportedKeyword(path, "is supported only in a schema without $ref, allOf, anyOf, oneOf and if")
        if "propertyNames" in schema and schema["propertyNames"] is not True:
            return {}  # part of what `propertyNames` becomes
        return {"additionalProperties": self._schema(schema[keyword], path)}

    def _property_names(self, schema: Mapping[str, Any], path: str) -> Fragment:
        """Return `propertyNames` as properties or patternProperties, beside which nothing is allowed."""
        names, rest = schema["propertyNames"], schema.get("additionalProperties", True)
        if names is True or names == {}:
            return {}
        rest = self._schema(rest, f"{path.rpartition('.')[0]}.additionalProperties")
        given = _mapping(schema, "properties", path)
        values = finite_values(names, self._root)
        if "patternProperties" in schema or (values is None and given):
            raise UnsupportedKeyword(
                path, "is supported only without properties and patternProperties, or with an enum"
            )
        if values is not None:
            known = {name: True if name in given else rest for name in values if isinstance(name, str)}
            refused = {name: False for name in given if name not in known}
            return {"allOf": [{"properties": known | refused, "additionalProperties": False}]}
        limits = [keyword for keyword in ("pattern", "format", "minLength", "maxLength") if keyword in names]
        others = self._keywords.keys() & names.keys() - set(limits) - {"type"}
        if (len(limits) != 1 and set(limits) != {"minLength", "maxLength"}) or others:
            raise UnsupportedKeyword(path, "is supported only with one of pattern, format and length, or with an enum")
        found = self._schema(names, path)
        pattern = found.get("pattern") or f"^(?s:.{{{found.get('minLength', 0)},{found.get('maxLength', '')}}})$"
        return {"patternProperties": {pattern: rest}, "additionalProperties": False}

    def _dependent(self, schema: Mapping[str, Any], path: str) -> Fragment:
        """Return, for each property, the choice that it is missing or that what depends on it holds."""
        dependents = _mapping(schema, path.rpartition(".")[2], path)
        if len(dependents) > MAX_DEPENDENT:
            raise UnsupportedKeyword(path, f"is supported only for at most {MAX_DEPENDENT} properties")
        parts = []
        for name, needed in dependents.items():
            one = {"required": needed} if isinstance(needed, list) else needed
            parts.append({"anyOf": [{"properties": {name: False}}, self._schema(one, f"{path}.{name}")]})
        return {"allOf": parts} if parts else {}

    def _reference(self, schema: Mapping[str, Any], path: str) -> Fragment:
        reference = schema["$ref"]
        self._root.resolve(reference, path)
        self._names.setdefault(reference, f"d{len(self._names)}")
        self._refers[reference] = path
        return {"$ref": f"#/$defs/{self._names[reference]}"}

    def _options(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        options = self._list(schemas_of(schema, keyword, path), path)
        if keyword != "oneOf":
            options = list({json.dumps(option): option for option in options}.values())
        elif not self._is_strict:
            keyword = "anyOf"  # llguidance accepts oneOf only if no value can match two of the options
        return {keyword: options}

    def _not(self, schema: Mapping[str, Any], path: str) -> Fragment:
        base = {key: value for key, value in schema.items() if key != "not"}
        return {"allOf": [self._schema(negate(schema["not"], base, self._root, path), path)]}

    def _if(self, schema: Mapping[str, Any], path: str) -> Fragment:
        if not schema.keys() & {"then", "else"}:
            return {}
        base = {key: value for key, value in schema.items() if key not in ("if", "then", "else")}
        where = path.removesuffix(".if")
        holds = {"allOf": [schema["if"], schema.get("then", True)]}
        fails = {"allOf": [negate(schema["if"], base, self._root, path), schema.get("else", True)]}
        return {"allOf": [{"anyOf": [self._schema(holds, where), self._schema(fails, where)]}]}

    def _list(self, schemas: list[Any], path: str) -> list[Any]:
        return [self._schema(one, f"{path}[{n}]") for n, one in enumerate(schemas)]


def _unsupported(schema: Mapping[str, Any], path: str) -> Fragment:
    raise UnsupportedKeyword(path, "is not supported")


def _pattern(regex: str) -> Fragment:
    return {"pattern": f"^(?:{regex[1:-1]})$"} if regex else {}


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedKeyword(path, f"must be a number, not {value!r:.100}")
    return value


def _mapping(schema: Mapping[str, Any], keyword: str, path: str) -> Mapping[str, Any]:
    value = schema.get(keyword)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnsupportedKeyword(path, f"must be an object, not {value!r:.100}")
    return value


def _required_names(schema: Mapping[str, Any]) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
