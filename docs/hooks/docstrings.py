"""What the reference needs beyond griffe's own reading of the source: an extension of it, named in mkdocs.yml."""

from typing import Any

from griffe import Class, ExprCall, Extension, Module, Object


def fenced(text: str) -> str:
    """The text with each doctest at the margin in a fence: Markdown takes `>>>` for a quotation.

    The doctests of a section `Examples:` are indented, and are left to the parser of sections.
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside != (line.startswith(">>>") or (inside and bool(line.strip()))):
            lines.append("```" if inside else "```pycon")
            inside = not inside
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


def mend(cls: Class) -> None:
    """Take what a subclass closes by `field(init=False)` out of its constructor, and read `field()` as no default."""
    if "dataclass" not in cls.labels or "__init__" not in cls.members:
        return
    parameters = cls.members["__init__"].parameters
    for name, member in cls.members.items():
        value = member.value if member.is_attribute else None
        if not isinstance(value, ExprCall) or value.canonical_path != "dataclasses.field" or name not in parameters:
            continue
        given = {argument.name: str(argument.value) for argument in value.arguments}
        if given.get("init") == "False":
            del parameters[name]
        elif not given.keys() & {"default", "default_factory"}:
            parameters[name].default = None


def once(cls: Class) -> None:
    """Tell of a method where it is first declared, and not again in each class that implements it."""
    for base in cls.mro():
        for name in cls.members.keys() & base.members.keys():
            cls.members[name].docstring = None  # what has no docstring is not shown


class Readable(Extension):
    """Fences each docstring as it is read; mends constructors and drops repetitions when all are."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Replace the docstring's text."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Mend what the extension for dataclasses, which runs before, made of the constructors."""
        waiting: list[Any] = [pkg]
        while waiting:
            here = waiting.pop()
            if here.is_class:
                mend(here)
                once(here)
            waiting.extend(m for m in here.members.values() if not m.is_alias and (m.is_module or m.is_class))
