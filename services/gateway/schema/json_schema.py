"""A `SchemaRewriter` converts a JSON schema to the keywords that llguidance knows, which enforces schemas of JSON text.

Keywords that llguidance lacks are rewritten where an exact equivalent exists: formats, content encodings and patterns
become patterns of llguidance's dialect, `uniqueItems` of a few values becomes a list of arrays, and so on. Annotations
are left out. Of the definitions, only those to which the schema refers are kept, each once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from services.gateway.schema.alternatives import Alternatives
from services.gateway.schema.counted_chars import TEXT_KEYWORDS, CountedChars
from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.formats import encoding_regex, format_regex
from services.gateway.schema.negation import finite_values, negate
from services.gateway.schema.raw_text import length_of, regex_of, schemas_of
from services.gateway.schema.references import ALL_TYPES, MAX_NESTING, SchemaRoot, wrong_type
from services.gateway.schema.regex import num_counted, whole_match
from services.gateway.schema.unique_arrays import UniqueArrays

MAX_DEPENDENT = 4  # properties of one dependentRequired; each doubles the number of cases
Fragment = dict[str, Any]
# the value of a `$ref`, and the name of a property that every value behind the reference must have, or ""
Reference = tuple[str, str]


class SchemaRewriter:
    """A `SchemaRewriter` rewrites schemas that refer to the definitions in `root`, each of which it rewrites once.

    - `is_strict`: True: raise UnsupportedKeyword for a keyword that cannot be expressed. False: leave the keyword out.
    - `counted`: counts the characters of lengths and patterns.
    """

    def __init__(self, root: SchemaRoot, is_strict: bool, counted: CountedChars) -> None:
        self._root, self._is_strict, self._counted, self._alternatives = root, is_strict, counted, Alternatives(root)
        self._unique_arrays, self._depth = UniqueArrays(), 0
        self._names: dict[Reference, str] = {}  # names of definitions, by reference
        self._definitions: dict[Reference, Any] = {}  # the rewritten definitions, by reference
        self._found: dict[Reference, dict[Reference, str]] = {}  # for each definition, its references and their paths
        self._refers: dict[Reference, str] = {}  # the references in the schema that is being rewritten, and their paths
        # Each function returns what one keyword becomes. A keyword without a function is an annotation, is unknown to
        # JSON Schema, or is read together with another keyword.
        self._keywords: dict[str, Callable[[Mapping[str, Any], str], Fragment]] = {
            "type": self._type,
            "enum": self._enum,
            "const": lambda schema, path: {"const": schema["const"]},
            "pattern": lambda schema, path: _pattern(self._regex(schema, schema["pattern"], path)),
            "format": _format,
            "contentEncoding": lambda schema, path: _pattern(regex_of(encoding_regex, schema["contentEncoding"], path)),
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), self._length),
            **dict.fromkeys(("minProperties", "maxProperties"), self._num_properties),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
            "multipleOf": _multiple,
            "items": self._items,
            "prefixItems": self._prefix_items,
            "uniqueItems": self._unique_items,
            "required": _required,
            "properties": self._properties,
            "patternProperties": self._pattern_properties,
            **dict.fromkeys(("additionalProperties", "unevaluatedProperties"), self._additional_properties),
            "propertyNames": self._property_names,
            **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), self._dependent),
            "$ref": self._reference,
            "allOf": self._options,
            "anyOf": self._options,
            "oneOf": self._one_of,
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
                target = self._target(reference, place)
                self._definitions[reference], self._found[reference] = self._with_references(target, reference[0])
            definitions[self._names[reference]] = self._definitions[reference]
            waiting |= {one: at for one, at in self._found[reference].items() if self._names[one] not in definitions}
        return found | {"$defs": definitions} if definitions else found

    def _target(self, reference: Reference, path: str) -> Any:
        named, demanded = reference
        target = self._root.resolve(named, path)
        if not demanded or not isinstance(target, Mapping):
            return target
        return {**target, "required": [*_required_names(target), demanded]}

    def _with_references(self, schema: Any, path: str) -> tuple[Any, dict[Reference, str]]:
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

    def _length(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        value = length_of(schema, keyword, path)
        if value is not None and keyword in TEXT_KEYWORDS:
            self._counted.add(schema, value, path)
        return {} if value is None else {keyword: value}

    def _regex(self, schema: Mapping[str, Any], pattern: Any, path: str) -> str:
        regex = regex_of(whole_match, pattern, path)
        self._counted.add(schema, num_counted(pattern), path)
        return regex

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
        arrays = self._unique_arrays.of(values, length_of(schema, "minItems", path) or 0, longest, path)
        return {"enum": arrays}

    def _properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        properties = _mapping(schema, "properties", path)
        made: Fragment = {"properties": {name: self._schema(one, f"{path}.{name}") for name, one in properties.items()}}
        return made if properties else {}

    def _pattern_properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        patterns = _mapping(schema, "patternProperties", path)
        made = {}
        for pattern, one in patterns.items():
            regex = self._regex({"pattern": pattern}, pattern, path)
            made[_pattern(regex)["pattern"]] = self._schema(one, f"{path}.{pattern}")
        return {"patternProperties": made} if made else {}

    def _additional_properties(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        is_alone = not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "if", "additionalProperties", "not"}
        if keyword == "unevaluatedProperties" and not is_alone:
            raise UnsupportedKeyword(path, "is supported only in a schema without $ref, allOf, anyOf, oneOf and if")
        if schema.get("propertyNames", True) not in (True, {}):
            return {}  # `_property_names` also rewrites this keyword
        return {"additionalProperties": self._schema(schema[keyword], path)}

    def _property_names(self, schema: Mapping[str, Any], path: str) -> Fragment:
        """Return `propertyNames` as properties or patternProperties, and allow no other properties."""
        names, given = schema["propertyNames"], _mapping(schema, "properties", path)
        if names is True or names == {}:
            return {}
        if names is False:
            return {"allOf": [{"properties": dict.fromkeys(given, False), "additionalProperties": False}]}
        if not isinstance(names, Mapping):
            raise UnsupportedKeyword(path, f"must be a schema, not {names!r:.100}")
        others = next((one for one in ("additionalProperties", "unevaluatedProperties") if one in schema), "")
        rest = self._schema(schema[others], f"{path.rpartition('.')[0]}.{others}") if others else True
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
        more = self._keywords.keys() & names.keys() - set(limits) - {"type"}
        if (len(limits) != 1 and set(limits) != {"minLength", "maxLength"}) or more:
            raise UnsupportedKeyword(path, "is supported only with one of pattern, format and length, or with an enum")
        found = self._schema(names, path)
        pattern = found.get("pattern") or f"^(?s:.{{{found.get('minLength', 0)},{found.get('maxLength', '')}}})$"
        return {"patternProperties": {pattern: rest}, "additionalProperties": False}

    def _dependent(self, schema: Mapping[str, Any], path: str) -> Fragment:
        """Return, for each property, an `anyOf`: the property is missing, or the condition that depends on it holds."""
        dependents = _mapping(schema, path.rpartition(".")[2], path)
        if len(dependents) > MAX_DEPENDENT:
            raise UnsupportedKeyword(path, f"is supported only for at most {MAX_DEPENDENT} properties")
        parts = []
        for name, needed in dependents.items():
            one = {"required": needed} if isinstance(needed, list) else needed
            parts.append({"anyOf": [{"properties": {name: False}}, self._schema(one, f"{path}.{name}")]})
        return {"allOf": parts} if parts else {}

    def _reference(self, schema: Mapping[str, Any], path: str) -> Fragment:
        return self._refer((schema["$ref"], ""), path)

    def _refer(self, reference: Reference, path: str) -> Fragment:
        self._root.resolve(reference[0], path)
        self._names.setdefault(reference, f"d{len(self._names)}")
        self._refers[reference] = path
        return {"$ref": f"#/$defs/{self._names[reference]}"}

    def _options(self, schema: Mapping[str, Any], path: str) -> Fragment:
        keyword = path.rpartition(".")[2]
        options = self._list(schemas_of(schema, keyword, path), path)
        return {keyword: list({json.dumps(option): option for option in options}.values())}

    def _one_of(self, schema: Mapping[str, Any], path: str) -> Fragment:
        """Return `oneOf` as `anyOf` where no value can match two options; llguidance sees that only in simple cases.

        OpenAPI's `discriminator` names a property that tells the options apart, and that every value therefore has.
        """
        options = schemas_of(schema, "oneOf", path)
        named = schema.get("discriminator")
        tag = named.get("propertyName") if isinstance(named, Mapping) else None
        if isinstance(tag, str) and self._alternatives.are_told_apart_by(tag, options):
            return {"anyOf": [self._tagged(option, tag, f"{path}[{n}]") for n, option in enumerate(options)]}
        is_exact = self._is_strict and not self._alternatives.are_exclusive(options)
        return {"oneOf" if is_exact else "anyOf": self._list(options, path)}

    def _tagged(self, option: Any, tag: str, path: str) -> Any:
        """Return the schema `option` for values that have the property `tag`."""
        if self._alternatives.demands(tag, option):
            return self._schema(option, path)
        if option.keys() & self._keywords.keys() == {"$ref"}:
            return self._refer((option["$ref"], tag), path)
        return {"allOf": [self._schema(option, path), {"required": [tag]}]}

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


def _format(schema: Mapping[str, Any], path: str) -> Fragment:
    # OpenAPI has formats of numbers, such as int64.
    named = schema.get("type") or "string"
    is_text = "string" in (named if isinstance(named, list) else [named])
    return _pattern(regex_of(format_regex, schema["format"], path)) if is_text else {}


def _bound(schema: Mapping[str, Any], path: str) -> Fragment:
    keyword = path.rpartition(".")[2]
    value = schema[keyword]
    if isinstance(value, bool) and keyword.startswith("exclusive"):  # draft 4: a flag that belongs to the bound
        bound = keyword.removeprefix("exclusive").lower()
        return {keyword: schema[bound]} if value and isinstance(schema.get(bound), int | float) else {}
    if value is None:
        return {}
    return {keyword: _number(value, path)}


def _multiple(schema: Mapping[str, Any], path: str) -> Fragment:
    if _number(schema["multipleOf"], path) <= 0:
        raise UnsupportedKeyword(path, f"must be above 0, not {schema['multipleOf']!r}")
    return {"multipleOf": schema["multipleOf"]}


def _required(schema: Mapping[str, Any], path: str) -> Fragment:
    names = _required_names(schema)
    return {"required": list(dict.fromkeys(names))} if names else {}


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
