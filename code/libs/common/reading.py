"""YAML, read as plain values of bounded size."""

import yaml

from .errors import first_line, shown

CHARACTERS, NODES = 100_000, 5_000  # of YAML; values, with each alias (*name) written out


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and more values than NODES."""

    nodes = 0

    def compose_node(self, parent, index):
        mark, alias, before = self.peek_event().start_mark, self.check_event(yaml.AliasEvent), self.nodes
        node, keys = super().compose_node(parent, index), set()
        self.nodes += getattr(node, "size", NODES) if alias else 1  # no size yet: the alias is within its own value
        node.size = self.nodes - before
        if self.nodes > NODES:
            raise yaml.MarkedYAMLError(problem="too many values", problem_mark=mark)
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"{shown(key.value)} is given twice", problem_mark=key.start_mark)
            keys.add(str(key.value))
        return node


def parse_yaml(text):
    """The value in a piece of YAML. Raises ValueError with a message of one line for everything else."""
    if len(text) > CHARACTERS:
        raise ValueError(f"it has more than {CHARACTERS:,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        raise ValueError(f"line {e.problem_mark.line + 1}: {first_line(e.problem)}") from None
    except Exception as e:  # a value that is not of its tag, such as `!!int three`, makes PyYAML raise almost anything
        raise ValueError(first_line(e)) from None
