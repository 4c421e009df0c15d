"""The documents say what is so: their examples run, their tables are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import pytest
from cluster import Cluster
from msgspec import Meta, Struct

import dmap
from dmap import Client
from jobserver import pieces, protocol, server
from jobserver.jobs import Limits
from jobserver.protocol import Message

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROTOCOL = ROOT / "docs" / "protocol.md"
DESIGN = ROOT / "docs" / "design.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", PROTOCOL, DESIGN, PERFORMANCE]
IDS = [path.name for path in DOCUMENTS]


class Fence(NamedTuple):
    """A fenced block: its language, its text, and the line where it begins."""

    language: str
    text: str
    line: int


class Block(NamedTuple):
    """A piece of Python that is run; ``shown`` is what it prints as the document has it."""

    text: str
    shown: str
    line: int


def fences(path: Path) -> list[Fence]:
    found = []
    text = path.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        found.append(Fence(match[1], match[2], text.count("\n", 0, match.start()) + 2))
    return found


def modules(path: Path) -> dict[str, str]:
    """Return the blocks that are files: those that begin with the file's name as a comment."""
    named = (re.match(r"# (\w+\.py)\n", fence.text) for fence in fences(path))
    return {name[1]: fence.text for name, fence in zip(named, fences(path), strict=True) if name}


def blocks(path: Path) -> list[Block]:
    """Return the blocks that are one script together, in their order."""
    all_fences = fences(path)
    files = modules(path).values()
    return [
        Block(fence.text, after.text if after.language == "text" else "", fence.line)
        for fence, after in zip(all_fences, [*all_fences, Fence("", "", 0)][1:], strict=True)
        if fence.language == "python" and fence.text not in files
    ]


SEPARATOR = "\x1e"


def run(script: list[Block], folder: Path, servers: str = "") -> list[str]:
    """Run blocks as one script, as a file of its own. Returns what each of them printed."""
    source = f"\nprint({SEPARATOR!r}, end='')\n".join(block.text for block in script)
    path = folder / "script.py"
    path.write_text(source)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if servers:
        environment["DMAP_SERVERS"] = servers
    done = subprocess.run(
        [sys.executable, path],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(SEPARATOR)


def assert_shown(block: Block, printed: str) -> None:
    """Compare; ``...`` in the document stands for whatever differs from run to run."""
    same = doctest.OutputChecker().check_output(block.shown, printed, doctest.ELLIPSIS)
    assert same, f"line {block.line} shows\n{block.shown}\nand it prints\n{printed}"


# --- the README -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run the README's blocks as one script, on a server and a worker that has its modules."""
    folder = tmp_path_factory.mktemp("readme")
    for name, text in modules(README).items():
        (folder / name).write_text(text)
    names = [Path(name).stem for name in modules(README)]
    with Cluster() as cluster:
        cluster.start_worker(2, "--import", *names, path=folder)
        with Client(cluster.endpoints) as client:
            # A server knows which functions may be merged once a worker has told it.
            client.submit("resize", "a.png").result(20)
        return run(blocks(README), folder, ",".join(cluster.endpoints))


@pytest.mark.slow
@pytest.mark.parametrize("n", range(len(blocks(README))), ids=lambda n: f"block{n}")
def test_a_block_of_the_readme_prints_what_it_shows(n: int, printed: list[str]) -> None:
    assert_shown(blocks(README)[n], printed[n])


@pytest.mark.slow
def test_the_readmes_first_example_needs_no_server(tmp_path: Path) -> None:
    first = blocks(README)[0]
    assert_shown(first, run([first], tmp_path)[0])


def test_the_readmes_first_example_is_five_lines_and_shows_what_comes_out() -> None:
    first = blocks(README)[0]
    assert len(first.text.split("\n\n")[-1].splitlines()) <= 5
    assert first.shown


def test_the_names_that_the_readme_imports_are_public() -> None:
    imported = {
        alias.name
        for fence in fences(README)
        if fence.language == "python"
        for node in ast.walk(ast.parse(fence.text))
        if isinstance(node, ast.ImportFrom) and node.module == "dmap"
        for alias in node.names
    }
    assert imported <= set(dmap.__all__)


# --- all documents ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_a_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{target} has no such heading"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = {
    "jobserver": ["jobserver"],
    "dmap-worker": ["dmap.supervisor"],
    "dmap": ["dmap.cli"],
}


def said_options() -> dict[str, set[str]]:
    """Return the options that the documents' shell lines give to each of our commands."""
    found: dict[str, set[str]] = {}
    for path in DOCUMENTS:
        for fence in fences(path):
            for line in fence.text.splitlines() if fence.language == "sh" else ():
                words = line.partition("#")[0].split()
                words = [word for word in words if not re.match(r"\w+=", word)]
                if words and words[0] in COMMANDS:
                    command = " ".join(words[:2]) if words[0] == "dmap" else words[0]
                    found.setdefault(command, set()).update(w for w in words if w[:2] == "--")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(said_options()))
def test_an_option_in_the_documents_is_one_of_its_command(command: str) -> None:
    name, *subcommand = command.split()
    code = "import sys; from {} import main; sys.exit(main(sys.argv[1:]))"
    module = {"jobserver": "jobserver.__main__", "dmap-worker": "dmap.supervisor"}
    argv = [sys.executable, "-c", code.format(module.get(name, "dmap.cli")), *subcommand, "--help"]
    help_text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert said_options()[command] <= set(re.findall(r"--[a-z-]+", help_text))


def test_the_map_of_the_modules_is_complete() -> None:
    listed = set(re.findall(r"^\| `([a-z_/]+\.py)` \|", DESIGN.read_text(), re.M))
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("jobserver", "dmap")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "cli"
    }
    assert listed == there


def test_every_error_about_closures_links_to_a_section() -> None:
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "closures.md").read_text(), re.MULTILINE)
    there = {re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    texts = "".join(path.read_text() for path in (ROOT / "dmap").rglob("*.py"))
    named = set(re.findall(r"closures\.md#([a-z-]+)", texts))
    for node in ast.walk(ast.parse((ROOT / "dmap" / "kinds.py").read_text())):
        match node:
            case ast.Call(func=ast.Name("Kind"), args=[*_, ast.Constant(str(anchor))]):
                named.add(anchor)
    assert len(named) > 10
    assert named - there == set()


def test_the_tests_that_hold_the_promises_exist() -> None:
    there = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", DESIGN.read_text())
    assert named
    assert [name for name in named if f"def {name}(" not in there] == []


# --- the protocol -----------------------------------------------------------------------------

RECORDS = {
    name: kind
    for name, kind in vars(protocol).items()
    if isinstance(kind, type)
    and kind.__module__ == protocol.__name__
    and (issubclass(kind, Struct) or hasattr(kind, "_fields"))
    and not issubclass(kind, Message)
}
MESSAGES = {kind.__name__: kind for kind in Message.__subclasses__()}
ALIASES = {
    name: getattr(protocol, name)
    for name in (
        "Name",
        "Text",
        "ShortText",
        "Count",
        "Seconds",
        "SessionId",
        "BlobId",
        "Uniq",
        "Labels",
        "Role",
        "CODE",
        "REFUSAL",
        "FAILURE",
    )
}
PLAIN = {msgspec.Raw: "message", bool: "bool", int: "int", float: "float", str: "str", bytes: "bin"}


def type_text(kind: Any, *, by_name: bool = True) -> str:
    """Return a field's type and range as the document writes them."""
    for name, alias in ALIASES.items() if by_name else ():
        if alias == kind:
            return f"`{name}`"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return ", ".join([type_text(arguments[0]), *range_text(arguments[0], arguments[1])])
    if origin is Literal:
        return " or ".join(f'`"{value}"`' for value in arguments)
    if origin in (list, tuple):
        return f"array of {type_text(arguments[0])}"
    if origin is types.UnionType:
        return f"{type_text(arguments[0])} or nil"
    return PLAIN.get(kind) or f"`{kind.__name__}`"


def range_text(kind: Any, meta: Meta) -> Iterator[str]:
    unit = {str: " characters", bytes: " bytes"}.get(kind, " entries")
    least: float | None = meta.min_length
    most: float | None = meta.max_length
    if meta.ge is not None:
        least, most, unit = meta.ge, meta.le if meta.lt is None else meta.lt - 1, ""
    assert most is not None
    upper = "2^63 - 1" if most == 2**63 - 1 else f"{int(most):,}"
    if least is None:
        yield f"at most {upper}{unit}"
    else:
        yield f"{upper}{unit}" if least == most else f"{least} to {upper}{unit}"
    if meta.pattern is not None:
        yield "no control characters"


def default_text(value: Any) -> str:
    match value:
        case msgspec.NODEFAULT:
            return "required"
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case "" | b"" | () | []:
            return "empty"
        case float():
            return f"{value:g}"
        case int():
            return f"{value:,}"
        case _:
            return f'`"{value}"`'


def fields_of(kind: type) -> list[tuple[str, str, str]]:
    """Return the fields in order: name, type with range, default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if issubclass(kind, Struct):
        rows = []
        for field in msgspec.structs.fields(kind):
            default = field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            rows.append((field.name, type_text(hints[field.name]), default_text(default)))
        return rows
    defaults: dict[str, Any] = kind._field_defaults  # type: ignore[attr-defined]
    return [
        (name, type_text(hints[name]), default_text(defaults.get(name, msgspec.NODEFAULT)))
        for name in kind._fields  # type: ignore[attr-defined]
    ]


def sections() -> dict[str, str]:
    """Return the document's text under each heading of the third level."""
    parts = re.split(r"^(#+) (.+)\n", PROTOCOL.read_text(), flags=re.M)
    return {
        name: text
        for hashes, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
        if hashes == "###"
    }


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the rows that begin with a name in backticks."""
    rows = re.findall(r"^\| (`\w+`.*) \|$", text, re.M)
    return [row.split(" | ") for row in rows]


def test_the_document_has_every_message_and_record_and_no_other() -> None:
    assert set(sections()) == {*MESSAGES, *RECORDS}


@pytest.mark.parametrize("name", [*MESSAGES, *RECORDS])
def test_a_table_has_the_fields_of_its_message_in_order(name: str) -> None:
    kind = (MESSAGES | RECORDS)[name]
    rows = [(row[0].strip("`"), row[1], row[2]) for row in rows_of(sections()[name])]
    assert rows == fields_of(kind)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_says_who_says_it(name: str) -> None:
    direction = (MESSAGES[name].__doc__ or "").partition(":")[0]
    assert f"*{direction}*" in sections()[name]


def test_the_named_types_are_those_of_the_protocol() -> None:
    rows = rows_of(PROTOCOL.read_text().partition("## Types")[2].partition("\n## ")[0])
    expected = {name: type_text(kind, by_name=False) for name, kind in ALIASES.items()}
    assert {row[0].strip("`"): row[1] for row in rows if len(row) == 2} == expected


def test_the_limits_are_those_of_the_code() -> None:
    rows = rows_of(PROTOCOL.read_text().partition("## Limits")[2].partition("\n## ")[0])
    assert rows
    for name, value, *_ in rows:
        constant = name.strip("`")
        homes = [where for where in (protocol, pieces, server, Limits) if hasattr(where, constant)]
        assert homes, f"{constant} is nowhere"
        assert float(value.replace(",", "")) == getattr(homes[0], constant), constant


def test_every_limit_of_a_server_is_in_the_document() -> None:
    rows = rows_of(PROTOCOL.read_text().partition("## Limits")[2].partition("\n## ")[0])
    assert {field.name for field in dataclasses.fields(Limits)} <= {
        row[0].strip("`") for row in rows
    }


def test_every_code_of_an_error_or_a_refusal_is_explained() -> None:
    text = PROTOCOL.read_text().partition("## Errors")[2].partition("\n## ")[0]
    said = {code for row in rows_of(text) for code in re.findall(r"`(\w+)`", row[0])}
    assert said == {*typing.get_args(protocol.CODE), *typing.get_args(protocol.REFUSAL)}


def test_the_version_is_the_protocols() -> None:
    assert f"Version {protocol.MAJOR}.{protocol.MINOR}." in PROTOCOL.read_text()


@pytest.mark.slow
def test_the_client_and_the_worker_of_the_protocol_document_work(tmp_path: Path) -> None:
    script = blocks(PROTOCOL)
    with Cluster() as cluster:
        for block, out in zip(script, run(script, tmp_path, cluster.endpoints[0]), strict=True):
            assert_shown(block, out)


def test_the_modules_that_the_documents_name_can_be_imported() -> None:
    for path in (PROTOCOL, DESIGN):
        for name in re.findall(r"`((?:jobserver|dmap)\.[a-z_]+)`", path.read_text()):
            importlib.import_module(name)
