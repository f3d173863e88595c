"""Text to `Config` and back: YAML files, `section.field=value` overrides, strict types, `--help`.

Nothing is guessed and nothing is dropped: a key that is not a field, a key written twice, and a value that is not of
the field's type are errors that name the file (or override), the field, the value, and what would be valid.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import os
import textwrap
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from loqt_ds.config import fields
from loqt_ds.config.fields import Config

Section = TypeVar("Section")


class ConfigError(ValueError):
    """A configuration that cannot be read or cannot be honoured."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (YAML itself silently takes the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a plain name")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: `{key}` is written twice; keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# ---------------------------------------------------------------------------------------------------------------- types


def field_types(cls: Any) -> Mapping[str, Any]:
    """Field name -> resolved type of a dataclass, in the order of declaration."""
    return _field_types(cls)


@functools.cache  # it is asked for at every option that is read, and most of the time of reading them went there
def _field_types(cls: Any) -> Mapping[str, Any]:
    hints = get_type_hints(cls)
    return types.MappingProxyType({item.name: hints[item.name] for item in dataclasses.fields(cls)})


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _accepts(hint: Any, wanted: Any) -> bool:
    return wanted in _alternatives(hint)


def describe_type(hint: Any) -> str:
    """How a type is named to a user: `integer`, `nf4|fp4|int4|none`, `text, list of texts or null`."""
    names = {int: "integer", float: "number", bool: "true|false", str: "text", type(None): "null"}
    words = []
    for choice in _alternatives(hint):
        if get_origin(choice) is Literal:
            words.append("|".join(str(item) for item in get_args(choice)))
        elif get_origin(choice) is list:
            words.append({"text": "list of texts", "number": "list of numbers"}[describe_type(get_args(choice)[0])])
        else:
            words.append(names[choice])
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


class _Mismatch(Exception):
    """The value is not of this alternative of the type."""


def _convert_one(value: Any, hint: Any) -> Any:
    """`value` as the non-union type `hint`, or `_Mismatch`."""
    if hint is type(None) and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if get_origin(hint) is Literal and isinstance(value, str) and value in get_args(hint):
        return value
    if get_origin(hint) is list and isinstance(value, list | tuple):
        return [_convert_one(item, get_args(hint)[0]) for item in value]
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 (no dot) as text
            try:
                return float(value)
            except ValueError as error:
                raise _Mismatch from error
    if hint is str and isinstance(value, str):
        return value
    raise _Mismatch


def _quoted(value: Any, choices: list[Any]) -> str:
    """What else to say where text is valid and YAML has read a boolean or a number; else nothing."""
    is_list = isinstance(value, list) and list[str] in choices
    items = value if is_list else [value]
    if not (is_list or str in choices) or not all(isinstance(item, str | int | float) for item in items):
        return ""
    example = '["no", "yes"]' if is_list else '"0"'
    return f"; in quotation marks what YAML reads as a number or as true|false (no, yes, on, off), as in {example}"


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as a value of type `hint`; int is taken as float, bool never as a number; ConfigError naming `where`."""
    # null is tried first and plain text last, so that the word none, where null is valid, means null and not a file
    # name
    order = sorted(_alternatives(hint), key=lambda choice: (choice is str, choice is not type(None)))
    for choice in order:
        try:
            return _convert_one(value, choice)
        except _Mismatch:
            continue
    remedy = f"; give {describe_type(hint)}"
    if isinstance(value, str):
        choices = [str(item) for choice in order if get_origin(choice) is Literal for item in get_args(choice)]
        close = difflib.get_close_matches(value, choices, n=1)
        remedy += f" (did you mean {close[0]}?)" if close else ""
    else:
        remedy += _quoted(value, order)
    raise ConfigError(f"{where}={value!r} is not valid{remedy}")


def _special(cls: Any, name: str, value: Any) -> Any:
    """Spellings accepted besides the declared ones: a YAML boolean for double_quant, null for export.format."""
    if (cls, name) == (fields.LoQTConfig, "double_quant") and isinstance(value, bool):
        return "both" if value else "none"
    if (cls, name) == (fields.ExportConfig, "format") and value is None:
        return "none"
    return value


# ------------------------------------------------------------------------------------------------------ nested mappings


def _unknown(name: str, valid: Iterable[str], where: str, source: str) -> ConfigError:
    """The error for a name that is not there: the closest one, wherever it is, and all there are."""
    valid = list(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    elsewhere = [option for option in option_names() if option.rsplit(".", 1)[-1] == name]
    hint = f"did you mean `{(elsewhere or close)[0]}`? " if elsewhere or close else ""
    return ConfigError(f"{source}: unknown key `{name}` in {where}; {hint}valid are: {', '.join(valid)}")


def parse_section(cls: type[Section], mapping: Mapping[str, Any] | None, *, where: str, source: str) -> Section:
    """An instance of the section dataclass `cls` from `mapping`; fields that are absent keep their defaults.

    `where` names the section and `source` the file in errors. Raises ConfigError for an unknown key or a wrong type.
    """
    if mapping is None:  # a section whose lines are all commented out
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: section `{where}` is {mapping!r}; give fields under it as `field: value`")
    hints = field_types(cls)
    values = {}
    for name, value in mapping.items():
        if name not in hints:
            raise _unknown(name, hints, f"section `{where}`", source)
        values[name] = convert(_special(cls, name, value), hints[name], f"{source}: {where}.{name}")
    return cls(**values)


def from_dict(mapping: Mapping[str, Any] | None, *, source: str = "configuration") -> Config:
    """A Config from a nested mapping; raises ConfigError naming `source` for unknown keys and wrong types. Not
    validated."""
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: holds {type(mapping).__name__}, not sections; start with `model:` or `train:`")
    hints = field_types(Config)
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        if name not in hints:
            raise _unknown(name, hints, "the top level", source)
        if dataclasses.is_dataclass(hints[name]):
            values[name] = parse_section(hints[name], value, where=name, source=source)
        else:
            values[name] = convert(value, hints[name], f"{source}: {name}")
    return Config(**values)


def check_types(config: Config) -> None:
    """Raises ConfigError where a field of a Config that was built in Python is not of its declared type."""
    from_dict(config.to_dict())


# ------------------------------------------------------------------------------------------------------------ overrides


def option_names() -> list[str]:
    """Every option as a user writes it: `name`, `output_dir`, `model.shape`, ..."""
    names = []
    for name, hint in field_types(Config).items():
        names += [f"{name}.{inner}" for inner in field_types(hint)] if dataclasses.is_dataclass(hint) else [name]
    return names


def _override_value(text: str, hint: Any, where: str) -> Any:
    """The text of an override as a value of type `hint`."""
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        # regular expressions such as `*.q_proj` or `[qv]_proj` are not YAML; where text is valid they are meant
        # literally
        if not _accepts(hint, str):
            raise ConfigError(f"{where}={text!r} is not valid YAML; give {describe_type(hint)}") from error
        value = text
    is_braced = isinstance(value, dict) and text.lstrip().startswith("{")  # a mapping is meant, and refused
    if _accepts(hint, str) and not _accepts(hint, int) and not isinstance(value, str | list | None) and not is_braced:
        value = text  # `name=0017` is not the octal number YAML makes of it, `Question: {prompt}` no mapping
    return value


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Sets each `section.field=value` on `config` in place (values are YAML) and returns it; ConfigError on a bad
    one."""
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals:
            raise ConfigError(f"override `{override}` has no value; write it as section.field=value")
        names = option_names()
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            same = [option for option in names if option.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            best = (same or close or ["--help for the list"])[0]
            raise ConfigError(f"override `{override}`: unknown option `{name}`; did you mean `{best}`?")
        section, _, field_name = name.rpartition(".")
        target = getattr(config, section) if section else config
        hint = field_types(type(target))[field_name]
        value = _special(type(target), field_name, _override_value(text, hint, name))
        setattr(target, field_name, convert(value, hint, name))
    return config


# ---------------------------------------------------------------------------------------------------------------- files


def config_folder(kind: str) -> Path:
    """The repository's folder of files of `kind` ("models" or "recipes")."""
    return Path(__file__).resolve().parents[2] / "configs" / kind


def find_config_file(kind: str, name: str) -> Path:
    """The file `name` (.json for "models", .yaml for "recipes"); ConfigError listing the names there are."""
    suffix = {"models": ".json", "recipes": ".yaml"}[kind]
    folder = config_folder(kind)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there: install loqt_ds from its repository with `pip install -e .`")
    candidate = folder / f"{name.removesuffix(suffix)}{suffix}"
    if candidate.is_file():
        return candidate
    there = sorted(path.stem for path in folder.glob(f"*{suffix}"))
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"no file {name}{suffix} in configs/{kind}; {hint}there are: {', '.join(there) or 'none'}")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; ConfigError naming the file for anything that keeps it from being read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _absolute(value: Any, *, only_existing: bool) -> Any:
    """Path(s) made absolute; a hub name, for which nothing lies on the disk, stays as it is where `only_existing`."""
    if isinstance(value, list):
        return [_absolute(item, only_existing=only_existing) for item in value]
    if not value or (only_existing and not os.path.exists(os.path.expanduser(value))):
        return value
    return os.path.abspath(os.path.expanduser(value))


def resolve_paths(config: Config) -> Config:
    """Makes paths absolute in place, so that the saved configuration means the same from any working directory."""
    model, data = config.model, config.data
    if model.shape is not None and model.shape.endswith(".json"):
        model.shape = _absolute(model.shape, only_existing=True)
    model.path = _absolute(model.path, only_existing=False)
    data.path = _absolute(data.path, only_existing=False)
    data.validation_path = _absolute(data.validation_path, only_existing=False)
    data.name = _absolute(data.name, only_existing=True)
    data.tokenizer = _absolute(data.tokenizer, only_existing=not str(data.tokenizer).endswith(".model"))
    data.chat_template = _absolute(data.chat_template, only_existing=False)
    data.cache_dir = _absolute(data.cache_dir, only_existing=False)
    config.output_dir = _absolute(config.output_dir, only_existing=False)
    config.export.base = _absolute(config.export.base, only_existing=False)
    if config.checkpoint.resume not in ("none", "auto"):
        config.checkpoint.resume = _absolute(config.checkpoint.resume, only_existing=False)
    return config


def save_yaml(config: Config, path: str | Path) -> None:
    """Writes every field of `config`; `load_config` of the file gives an equal Config. OSError names the path."""
    path = Path(path)
    text = "# Every option of this run; `python -m loqt_ds.train --config THIS_FILE` repeats it.\n"
    text += yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, width=120)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------------------------- help


@functools.cache  # parsing the source takes longer than everything else before a run
def field_docs(cls: Any) -> dict[str, str]:
    """Field name -> the docstring written under it, read from the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _default(item: dataclasses.Field[Any]) -> str:
    """The default of a field as it would be written in YAML."""
    value = item.default
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _help_entry(name: str, item: dataclasses.Field[Any], cls: Any) -> str:
    head = f"  {name}={_default(item)}   ({describe_type(field_types(cls)[item.name])})"
    indent = " " * 6
    # Not at hyphens: a line break there could be read as a space within the word.
    lines = textwrap.wrap(
        field_docs(cls)[item.name], 110, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return "\n".join([head, *lines])


def help_text() -> str:
    """Every option with its default, type and meaning, for `--help`."""
    lines = ["options (section.field=value on the command line, or section: {field: value} in YAML):", ""]
    documented = field_docs(Config)  # the sections among its fields have class docstrings instead
    lines += [_help_entry(item.name, item, Config) for item in dataclasses.fields(Config) if item.name in documented]
    for section, cls in field_types(Config).items():
        if dataclasses.is_dataclass(cls):
            lines += ["", f"{section}: {inspect.getdoc(cls)}"]
            lines += [_help_entry(f"{section}.{item.name}", item, cls) for item in dataclasses.fields(cls)]
    return "\n".join(lines)
