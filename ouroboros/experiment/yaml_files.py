"""YAML files to objects of the schema; what is wrong with one is said in one line."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from ..errors import InputError
from .schema import Strict


class _Loader(yaml.SafeLoader):
    """Of two values of a key, PyYAML would take the second one without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands there twice",
                                                    node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """What a YAML file holds. Raises InputError naming it where it can't be read, is no YAML or names a key twice."""
    try:
        return _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: can't be read as YAML ({' '.join(str(error).split())})") from None


def validated(kind: type[Strict], data, file: str):
    """An object of `kind` from plain data. Raises InputError, naming file, field and value."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field, value = ".".join(map(str, first["loc"])) or "the whole", first["input"]
        shown = "" if isinstance(value, dict) else f"{value!r:.80}: "
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            said = f"no such field; there are {', '.join(kind.model_fields)}"
        raise InputError(f"{file}: {field}: {shown}{said}") from None
