"""Counts how the code reads (sizes, names, lambdas, comments, docstrings) and checks the limits.

    python -m scripts.style_figures [FOLDER ...] [--package=cxr_jax] [--check] [--worst=N]

Prints a column for the package and one for each FOLDER, such as a checkout of another project, then
the places in the package that a limit is about. What is counted:

files, lines            .py files except tests, empty files and what Python cannot parse; lines
                        include blank ones, here and wherever a figure is a share of the lines
functions               every def, nested ones and methods included; from `def` to the last line,
                        without decorators; "no tables" leaves out what Function.may_be_long accepts
closures                functions inside another function, of all functions
arguments, annotated    parameters except self, cls, *args, **kwargs; returns of all functions
takes `config`          functions with a parameter of exactly this name
public docstring        of the functions and methods without a leading _ and not inside another
names shapes, errors    docstrings with "[B, height]" or "shape"; with "raise" or "...Error"; both
                        as a share of all public functions, so one without a docstring counts
lambdas, ternaries      `lambda` and `a if b else c`; named: `name = lambda ...`
mean identifier         letters of a name at each place that binds it: variables (by =, for, with,
                        :=, comprehensions) and parameters (self, *args and those of lambdas, too);
                        uses, attributes, imports, functions, classes do not; one-letter: the same
comment, docstring      comments, those behind code included; lines of all docstrings
imports a module        different X in `import X` and `from X import ...`; lazy: inside a function
line length             without blank lines; > 100 characters: of all lines
folders                 folders with .py files, tests left out, empty files included
"""

import ast
import io
import re
import sys
import tokenize
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median

PACKAGE = Path(__file__).parents[1] / "cxr_jax"
TEST_FOLDERS = {"test", "testing", "tests"}
LEAST_IDENTIFIER = 6.5  # letters, on average
ALLOWED_LONG: frozenset[str] = frozenset()  # "cxr_jax/file.py:function", each with its reason
# What --check demands of the last number of a figure: at least the first, and below the second.
LIMITS = {
    "mean identifier length": (LEAST_IDENTIFIER, float("inf")),
    "lambdas a 1,000 lines": (0, 4),
    "ternaries a 1,000 lines": (0, 12),
    "comment lines, %": (7, 100),  # one for each paragraph of a long function, and each surprise
    "folders with > 15 files": (0, 1),  # more than a reader takes in at a glance
    "functions > 60 lines, no tables": (0, 1),
    "functions with > 10 arguments": (0, 1),  # a dataclass would name what belongs together
    "functions that take `config`": (0, 10),  # any of them might read any key of it
    "`# fmt: skip / off`": (0, 1),  # one formatter, and no two styles in a file
    "files that do not parse": (0, 1),  # or they would escape the other limits
}

SHAPE = re.compile(r"\[\w+(, ?[\w*/+. -]+)+\]|\b[Ss]hape[ds]?\b")  # [B, 2 * width] or the word
ERROR = re.compile(r"\b([Rr]ais\w*|\w+Error)\b")  # raises, raised, ValueError
FORMATTER_EXCEPTION = re.compile(r"#\s*fmt:\s*(skip|off)")
VALUE_MAKER = re.compile(r"(^dict|\b[A-Z]\w*)$")  # dict() and classes: ConfigDict(), config.Key()
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)
TABLE_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Return)  # a table has only these, and none of:
COMPUTATIONS = (ast.comprehension, ast.Lambda, ast.IfExp, ast.JoinedStr, ast.NamedExpr, ast.Await)


class Function:
    """A function, its parameters, and where it stands."""

    def __init__(self, definition: ast.FunctionDef, path: str, nested: bool) -> None:
        listed = definition.args.posonlyargs + definition.args.args + definition.args.kwonlyargs
        self.definition = definition
        self.nested = nested  # inside another function
        self.place = f"{path}:{definition.name}"
        self.length = definition.end_lineno - definition.lineno + 1  # decorators stand above
        bound = ("self", "cls")  # nobody writes these in a call
        self.parameters = {each.arg: each.annotation for each in listed if each.arg not in bound}
        self.docstring = ast.get_docstring(definition) or ""
        self.public = not nested and not definition.name.startswith("_")
        self.summary = f"{self.place} ({self.length} lines, {len(self.parameters)} arguments)"

    def may_be_long(self) -> bool:
        """Whether it is allowed by name, or only writes values down, so nothing can be split."""
        statements = self.definition.body[bool(self.docstring) :]
        elements = [element for statement in statements for element in ast.walk(statement)]
        called = [ast.unparse(call.func) for call in elements if isinstance(call, ast.Call)]
        computes = any(isinstance(element, COMPUTATIONS) for element in elements)
        straight = all(isinstance(statement, TABLE_STATEMENTS) for statement in statements)
        is_table = straight and not computes and all(map(VALUE_MAKER.search, called))
        return is_table or self.place in ALLOWED_LONG


class Source:
    """One file, and the nodes of its tree, each with whether it stands inside a function."""

    def __init__(self, path: str, content: str) -> None:
        tokens = tokenize.generate_tokens(io.StringIO(content).readline)
        self.path = path
        self.lines = content.splitlines()
        self.tree = ast.parse(content)
        self.nodes = list(walk_tree(self.tree, nested=False))
        self.comments = [token for token in tokens if token.type == tokenize.COMMENT]
        exceptions = [token for token in self.comments if FORMATTER_EXCEPTION.match(token.string)]
        self.exceptions = [f"{path}:{token.start[0]}" for token in exceptions]
        definitions = [placed for placed in self.nodes if isinstance(placed[0], FUNCTIONS)]
        self.functions = [Function(definition, path, nested) for definition, nested in definitions]
        # Not each different name once: what is bound often is also read often.
        stored = [name for name in self.find(ast.Name) if isinstance(name.ctx, ast.Store)]
        self.names = [name.id for name in stored] + [listed.arg for listed in self.find(ast.arg)]
        self.modules = {alias.name for node in self.find(ast.Import) for alias in node.names}
        for imported in self.find(ast.ImportFrom):
            self.modules.add("." * imported.level + (imported.module or ""))
        owners = [self.tree, *self.find(ast.ClassDef, *FUNCTIONS)]
        docstrings = [owner.body[0] for owner in owners if ast.get_docstring(owner) is not None]
        self.docstring_lines = sum(string.end_lineno - string.lineno + 1 for string in docstrings)
        assigned = [node for node in self.find(ast.Assign) if isinstance(node.targets[0], ast.Name)]
        self.named_lambdas = sum(isinstance(node.value, ast.Lambda) for node in assigned)
        self.lazy_imports = sum(inside and isinstance(node, IMPORTS) for node, inside in self.nodes)

    def find(self, *node_types: type[ast.AST]) -> list[ast.AST]:
        """The nodes of these types."""
        return [node for node, nested in self.nodes if isinstance(node, node_types)]


class Package:
    """The files of a folder that count, and how many files each folder inside has."""

    def __init__(self, folder: Path) -> None:
        self.sources: list[Source] = []
        self.unparsed: list[str] = []
        self.folders: Counter[str] = Counter()  # files in each, also the empty ones
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if is_test(inside) and folder.name not in TEST_FOLDERS:  # unless tests were asked for
                continue
            shown_path = (folder.name / inside).as_posix()
            content = path.read_text(encoding="utf-8")
            self.folders[shown_path.rpartition("/")[0]] += 1
            if content.strip():  # an empty __init__.py says nothing about style
                try:
                    self.sources.append(Source(shown_path, content))
                except SyntaxError:  # for example, written for a newer Python
                    self.unparsed.append(shown_path)
        self.functions = [function for source in self.sources for function in source.functions]

    def places(self) -> dict[str, list[str]]:
        """By figure, the places that it counts: where to go to lower it."""
        long_ones = [function for function in self.functions if function.length > 60]
        too_long = [function.summary for function in long_ones if not function.may_be_long()]
        crowded = [function for function in self.functions if len(function.parameters) > 10]
        takers = [function for function in self.functions if "config" in function.parameters]
        return {
            "functions > 60 lines, no tables": too_long,
            "functions with > 10 arguments": [function.summary for function in crowded],
            "functions that take `config`": [function.summary for function in takers],
            "`# fmt: skip / off`": [place for each in self.sources for place in each.exceptions],
            "folders with > 15 files": [name for name, count in self.folders.items() if count > 15],
            "files that do not parse": self.unparsed,
        }

    def measure(self) -> dict[str, tuple[float, ...]]:
        """The figures, each one number or several."""
        sources = self.sources
        lengths = sorted(len(source.lines) for source in sources)
        lines = [line for source in sources for line in source.lines]
        names = [name for source in sources for name in source.names]
        kinds = Counter(type(node) for source in sources for node, _ in source.nodes)
        comments = sum(len(source.comments) for source in sources)
        docstring_lines = sum(source.docstring_lines for source in sources)
        lazy_imports = sum(source.lazy_imports for source in sources)
        imports = [len(source.modules) for source in sources]
        near_end = lengths[len(lengths) * 9 // 10]
        return {
            "files": (len(sources),),
            "lines": (len(lines),),
            "median / 90 % / max file": (median(lengths), near_end, lengths[-1]),
            **self.measure_functions(),
            "lambdas a 1,000 lines": (1000 * kinds[ast.Lambda] / len(lines),),
            "named lambdas": (sum(source.named_lambdas for source in sources),),
            "ternaries a 1,000 lines": (1000 * kinds[ast.IfExp] / len(lines),),
            "mean identifier length": (mean(map(len, names)),),
            "one-letter names, %": (percent(len(name) == 1 for name in names),),
            "comment lines, %": (100 * comments / len(lines),),
            "docstring lines, %": (100 * docstring_lines / len(lines),),
            "module docstring, %": (percent(ast.get_docstring(source.tree) for source in sources),),
            "imports a module, median / max": (median(imports), max(imports)),
            "lazy imports a 1,000 lines": (1000 * lazy_imports / len(lines),),
            "mean line length": (mean(len(line) for line in lines if line.strip()),),
            "lines > 100 characters, %": (percent(len(line) > 100 for line in lines),),
            "folders / most files in one": (len(self.folders), max(self.folders.values())),
            **{figure: (len(places),) for figure, places in self.places().items()},
        }

    def measure_functions(self) -> dict[str, tuple[float, ...]]:
        """The figures that are about functions."""
        functions = self.functions
        lengths = sorted(function.length for function in functions)
        near_end = lengths[len(lengths) * 99 // 100]
        long_ones = [length > 60 for length in lengths]
        counts = [len(function.parameters) for function in functions]
        crowded = sum(count > 7 for count in counts)
        annotations = [value for function in functions for value in function.parameters.values()]
        docstrings = [function.docstring for function in functions if function.public]
        return {
            "functions": (len(functions),),
            "median / 99 % / max function": (median(lengths), near_end, lengths[-1]),
            "functions > 60 lines, and %": (sum(long_ones), percent(long_ones)),
            "closures, %": (percent(function.nested for function in functions),),
            "functions with > 7 arguments, max": (crowded, max(counts)),
            "public docstring, %": (percent(docstrings),),
            "docstrings that name shapes, %": (percent(map(SHAPE.search, docstrings)),),
            "docstrings that name errors, %": (percent(map(ERROR.search, docstrings)),),
            "annotated parameters, %": (percent(annotations),),
            "annotated returns, %": (percent(each.definition.returns for each in functions),),
        }


def walk_tree(node: ast.AST, nested: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node of a tree, and whether it stands inside a function."""
    yield node, nested
    for child in ast.iter_child_nodes(node):
        yield from walk_tree(child, nested or isinstance(node, FUNCTIONS))


def is_test(inside: Path) -> bool:
    """Whether a file, its path relative to the package, belongs to the tests."""
    named_so = inside.name.startswith(("test_", "conftest.")) or inside.name.endswith("_test.py")
    return named_so or not TEST_FOLDERS.isdisjoint(inside.parts[:-1])


def percent(answers: Iterable[object]) -> float:
    """The share of answers that are neither false, nor empty, nor None; 0 of no answers."""
    return 100 * mean([bool(answer) for answer in answers] or [False])


def print_figures(packages: dict[str, Package]) -> None:
    """Prints the figures of all packages side by side."""
    tables = [package.measure() for package in packages.values()]
    print(f"{'':34}", *(f"{path[-20:]:>20}" for path in packages))
    for figure in tables[0]:
        cells = [" / ".join(f"{round(value, 2):g}" for value in table[figure]) for table in tables]
        print(f"{figure:34}", *(f"{shown:>20}" for shown in cells))


def broken_limits(package: Package) -> list[str]:
    """One text for each limit that the package breaks."""
    figures = package.measure()
    return [
        f"{figure}: {figures[figure][-1]:.4g} is not in [{least:g}, {below:g})"
        for figure, (least, below) in LIMITS.items()
        if not least <= figures[figure][-1] < below
    ]


def print_worst(sources: list[Source], count: int) -> None:
    """Prints the files that do most harm to a figure, and where in them."""
    print("\nletters missing to the least mean; mean; short names, and how often each is bound")
    # Not the lowest means: a large file of middling names weighs more than a small one of bad ones.
    missing = {each: sum(LEAST_IDENTIFIER - len(name) for name in each.names) for each in sources}
    for source in sorted(sources, key=missing.get, reverse=True)[:count]:
        short = Counter(name for name in source.names if len(name) < LEAST_IDENTIFIER - 2)
        often = " ".join(f"{name}*{times}" for name, times in short.most_common(12))
        average = LEAST_IDENTIFIER - missing[source] / max(len(source.names), 1)
        print(f"{source.path}: {missing[source]:.0f}; {average:.1f}; {often}")
    for title, expression in (("lambdas", ast.Lambda), ("ternaries", ast.IfExp)):
        print(f"\n{title}; their lines")
        found = {each.path: [node.lineno for node in each.find(expression)] for each in sources}
        totals = Counter({path: len(numbers) for path, numbers in found.items()})
        for path, total in totals.most_common(count):
            print(f"{path}: {total}; {' '.join(map(str, sorted(found[path])))}")


def main() -> int:
    """Prints what was asked for; 1 where `--check` finds a broken limit."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--package", type=Path, default=PACKAGE, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is broken")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list the N worst files")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in (arguments.package, *arguments.folders)]
    packages = {str(folder): Package(folder) for folder in folders}
    for folder, package in packages.items():
        if not package.functions:
            parser.error(f"no functions in {folder}")
    package = packages[str(folders[0])]
    print_figures(packages)
    for figure, places in package.places().items():
        print(f"\n{figure}: {len(places)}", *places, sep="\n    ")
    if arguments.worst:
        print_worst(package.sources, arguments.worst)
    failures = broken_limits(package) if arguments.check else []
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
