"""The part of JSON Schema that our published schemas use, so that tests can check results without another package."""

from __future__ import annotations

from typing import Any

_TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
    "integer": int,
}  # fmt: skip
_KNOWN = {
    "$schema", "title", "description", "$defs", "$ref", "type", "enum", "properties", "required",
    "additionalProperties", "items", "minItems", "maxItems", "minimum", "maximum", "minLength",
}  # fmt: skip


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, place: str = "$") -> list[str]:
    """What of a value contradicts a schema, each with its place; an unknown keyword is an error of the test itself."""
    root = root or schema
    assert set(schema) <= _KNOWN, f"{place}: keywords {set(schema) - _KNOWN} are not implemented here"
    if "$ref" in schema:
        return violations(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root, place)
    found = []
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        fits = any(isinstance(value, _TYPES[n]) and (n == "boolean" or not isinstance(value, bool)) for n in names)
        if not fits:
            return [f"{place}: {value!r} is not {' or '.join(names)}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: {value!r} is not one of {schema['enum']}")
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{place}: {key} is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            inner = properties.get(key, more)
            if inner is False:
                found.append(f"{place}: {key} is unknown")
            elif isinstance(inner, dict):
                found += violations(item, inner, root, f"{place}.{key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{place}: {len(value)} items")
        for number, item in enumerate(value):
            found += violations(item, schema.get("items", {}), root, f"{place}[{number}]")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{place}: {value} is out of range")
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append(f"{place}: too short")
    return found
