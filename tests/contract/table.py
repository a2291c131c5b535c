"""FAMILIES x METHODS: the cases of the contract tests, and those of them that `make test` runs.

A case is a family's tiny model with one of a method's examples, alone or within `Coda`. A new
family or method is in all of these tests by its registration alone.

Contracts that need the same compiled programs make a group, and run on the same cases. By default
these are few: each group has each family, each method and routing in each family at least once, and
all groups together each family with each method, each method within `Coda`, and each example. The
others are marked `all`. Compiling takes nearly all of the time, so two encoder layers are for a
method's usual example in `make test-all`; the default cases and other examples have one.
"""

from collections.abc import Callable, Container, Iterable
import dataclasses
import functools

import pytest

from coda_jax.methods import METHODS, Coda, Method
from coda_jax.models import FAMILIES, ModelConfig

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Case:
    """A family with a method.

    Attributes:
        family: its name.
        method: the name of the method, or "dense".
        adaptation: what tells its methods from others, for people.
        methods: of the config.
        num_encoder_layers: of the config.
    """

    family: str
    method: str
    adaptation: str
    methods: tuple[Method, ...]
    num_encoder_layers: int = 2

    @property
    def example(self) -> str:
        """Which of the method's examples it is, alone or within `Coda`."""
        return self.adaptation.removeprefix(f"{Coda.name}+")

    @property
    def is_usual(self) -> bool:
        """Whether it is the method's first example."""
        return self.example == self.method

    @property
    def config(self) -> ModelConfig:
        """The tiny model, which draws no random numbers."""
        return FAMILIES[self.family].tiny.replace(
            methods=self.methods, num_encoder_layers=self.num_encoder_layers, dropout_rate=0.0
        )

    def __str__(self):
        return f"{self.family}-{self.adaptation}"


def adaptations() -> dict[str, tuple[str, tuple[Method, ...]]]:
    """{description: (name of the method, the methods)}: each example, alone and within `Coda`."""
    found = {DENSE: (DENSE, ())}
    for name, method in METHODS.items():
        usual, *others = method.examples()
        for example in (usual, *others):
            values, usual_values = dataclasses.asdict(example), dataclasses.asdict(usual)
            changed = [
                f"{field}={value}" if isinstance(value, int | float | str) else field
                for field, value in values.items()
                if value != usual_values[field]
            ]
            described = f"{name}({','.join(changed)})" if changed else name
            found[described] = name, (example,)
            if method is not Coda:
                within = Coda.examples()[0]
                found[f"{Coda.name}+{described}"] = name, (within, example)
    return found


def _case(family: str, adaptation: str, method: str, methods: tuple[Method, ...]) -> Case:
    """With two layers, or one if its example is not the method's usual one."""
    case = Case(family, method, adaptation, methods)
    return case if case.is_usual else dataclasses.replace(case, num_encoder_layers=1)


CASES = tuple(
    _case(family, adaptation, method, methods)
    for adaptation, (method, methods) in adaptations().items()
    for family in FAMILIES
)


def adapted(case: Case) -> bool:
    """Whether there is a method."""
    return case.method != DENSE


def routed(case: Case) -> bool:
    """Whether some tokens do not go through the layers."""
    return any(isinstance(method, Coda) for method in case.methods)


def with_one_family(cases: Iterable[Case]) -> list[Case]:
    """Usual examples with each family, and each other example with one, in turns."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.adaptation, []).append(case)
    return [
        case
        for number, row in enumerate(found.values())
        for case in (row if row[0].is_usual else [row[number % len(row)]])
    ]


def any_case(case: Case) -> bool:
    """True."""
    del case
    return True


@dataclasses.dataclass(frozen=True)
class Group:
    """Contracts that run on the same cases.

    Attributes:
        covers: whether a case is one for them.
        methods: whether each method must be in the default cases, beside each family.
    """

    covers: Callable[[Case], bool]
    methods: bool = True


GROUPS = {
    "rows": Group(any_case),
    "budget": Group(routed, methods=False),
    "training": Group(adapted),
    "outputs": Group(adapted),
    "files": Group(adapted),
    "arithmetic": Group(any_case),
    "parameters": Group(any_case),
    "export": Group(adapted, methods=False),
    "tpu": Group(routed, methods=False),
}


def _pairs(group: str, case: Case) -> set[tuple]:
    """What a case covers of what the default cases must."""
    pairs = {(group, "family", case.family)}
    if GROUPS[group].methods:
        pairs |= {(group, "method", case.method)}
        pairs |= {(group, "routed", case.family)} if routed(case) else set()
        pairs |= {("family, method", case.family, case.method), ("example", case.example)}
        pairs |= {("routed method", case.method)} if routed(case) else set()
    return pairs


@functools.cache
def default_cases() -> dict[str, tuple[Case, ...]]:
    """The cases of each group that `make test` runs, chosen greedily, the same each time."""
    chosen: dict[str, list[Case]] = {group: [] for group in GROUPS}
    seen: set[tuple] = set()

    def choose(group: str, wanted: Callable[[tuple], bool]) -> None:
        cases = [case for case in CASES if GROUPS[group].covers(case)]
        left = {pair for case in cases for pair in _pairs(group, case) if wanted(pair)}
        while left := left - seen:
            used = {case for cases in chosen.values() for case in cases}
            # Of the cases that are worth the same, one whose programs another group compiles.
            best = max(
                (case for case in cases if left & _pairs(group, case)),
                key=lambda case: (len(_pairs(group, case) - seen), case in used),
            )
            chosen[group].append(best)
            seen.update(_pairs(group, best))

    for group in GROUPS:
        choose(group, lambda pair, group=group: pair[0] == group)
    choose(next(iter(GROUPS)), lambda pair: True)
    return {group: tuple(cases) for group, cases in chosen.items()}


def each_case(group: str, where: Callable[[Case], bool] = any_case) -> pytest.MarkDecorator:
    """Parametrizes a test over the cases of a group; those beyond the default are marked `all`."""
    default = {str(case) for case in default_cases()[group]}
    return parametrized(filter(where, filter(GROUPS[group].covers, CASES)), default)


def parametrized(cases: Iterable[Case], default: Container[str] = ()) -> pytest.MarkDecorator:
    """Parametrizes a test over cases; those that are not among the default are marked `all`."""
    params = []
    for case in cases:
        if str(case) in default:
            shallow = dataclasses.replace(case, num_encoder_layers=1)
            params.append(pytest.param(shallow, id=str(case)))
        else:
            params.append(pytest.param(case, id=str(case), marks=pytest.mark.all))
    return pytest.mark.parametrize("case", params)


each_family = pytest.mark.parametrize("family", FAMILIES)


def one_family_by_default(number: int) -> pytest.MarkDecorator:
    """Parametrizes a test over the families; all but one, by its number, are marked `all`."""
    chosen = [*FAMILIES][number % len(FAMILIES)]
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(name, marks=[] if name == chosen else [pytest.mark.all])
            for name in FAMILIES
        ],
    )
