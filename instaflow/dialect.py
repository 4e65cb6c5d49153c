"""YAML without its traps: how an experiment file and `--set` are read, and how an experiment is written."""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from instaflow.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML 1.2's core types: only true and false are booleans, 1e-6 is a float, dates and sexagesimals are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), None)
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|Null|NULL|~|)$"), None)
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), None)
FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, None)


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back: a text that either dialect of YAML takes for something else stands in quotes."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, None)


def construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).replace("_", ""))


def construct_mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping in which a key that stands twice is an error, where PyYAML would let the last one win in silence."""
    seen: set[str] = set()
    for key_node, _ in node.value:
        mark = key_node.start_mark
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConstructorError(problem="a key must be a single word, not a list or a mapping", problem_mark=mark)
        if key_node.value in seen:
            raise ConstructorError(problem=f"'{key_node.value}' stands twice in one mapping", problem_mark=mark)
        seen.add(key_node.value)
    # Keys are names: a stage called 2024 stays text.
    return {key_node.value: loader.construct_object(value_node, deep=True) for key_node, value_node in node.value}


Loader.add_constructor("tag:yaml.org,2002:float", construct_float)
Loader.add_constructor("tag:yaml.org,2002:map", construct_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` spells; `where` names it in errors. Raises ConfigError."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is not valid YAML: it is nested too deeply") from error
    except (ValueError, LookupError, AttributeError) as error:  # what PyYAML lets through
        raise ConfigError(f"{where} has a value that is not what its '!!' tag says") from error
