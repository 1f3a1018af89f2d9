"""The catalogue: the 73 methods, which of them work, and where their plugs stand. Imports nothing heavy."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.errors import InvalidInput, MissingExtra, check

if TYPE_CHECKING:
    from surefoot.core.instrument import Instrument
    from surefoot.core.treatment import Treatment

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One entry. `treatment` and `instruments` are `module:Class` references, empty until the method is built."""

    slug: str
    family: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str
    sentence: str
    offers: tuple[str, ...]
    headline: str = ""  # of its trial's claims the one that tells most of the method
    treatment: str = ""
    when: str = ""
    cost: str = ""
    use: str = ""  # lines that use the method in a person's own loop

    @property
    def name(self) -> str:
        return f"{self.family}/{self.slug}"

    @property
    def module(self) -> str:
        return f"surefoot.{self.family}.{self.slug}"

    @property
    def paper(self) -> str:
        people = [a.split(",")[0] for a in self.authors if a != "others"]
        who = people[0] if len(people) == 1 and len(self.authors) == 1 else f"{people[0]} et al."
        if len(self.authors) == 2 and "others" not in self.authors:
            who = " and ".join(people)
        return f"{who}, {self.venue} {self.year}, arXiv {self.arxiv}"


@dataclass(frozen=True)
class InstrumentEntry:
    slug: str
    plug: str  # module:Class
    sentence: str


@cache
def _table() -> dict[str, Any]:
    with (PACKAGE / "catalog.toml").open("rb") as file:
        return tomllib.load(file)


@cache
def methods() -> tuple[Method, ...]:
    """All methods, in the catalogue's order (by family, then slug)."""
    return tuple(_method(entry) for entry in _table()["method"])


def _method(entry: dict[str, Any]) -> Method:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Method(**fields)


@cache
def instruments() -> tuple[InstrumentEntry, ...]:
    """All instruments, in the order in which an audit runs them."""
    return tuple(InstrumentEntry(**entry) for entry in _table().get("instrument", []))


def find(slug: str) -> Method:
    """The method called `slug` or `family/slug`."""
    for method in methods():
        if slug in (method.slug, method.name):
            return method
    import difflib

    near = difflib.get_close_matches(slug.split("/")[-1], [m.slug for m in methods()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see `surefoot list`."
    raise InvalidInput(f"There is no method {slug!r}; {hint}")


# --- does it work? --------------------------------------------------------------------------------------------------


def evidence_folder() -> Path:
    """Where the committed evidence stands: inside an installed package, else at the root of the checkout."""
    inside = PACKAGE / "_evidence"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "evidence"


def evidence(method: Method) -> dict[str, Any] | None:
    """The committed evidence of a method, as written by `surefoot trial`."""
    path = evidence_folder() / method.family / f"{method.slug}.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InvalidInput(f"{path} is not valid JSON ({error}); run the trial again.") from error


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def works(method: Method) -> bool:
    """Importable, with a protocol, and with committed evidence of at least five seeds."""
    found = evidence(method)
    return (
        _exists(method.module)
        and _exists(f"surefoot.trials.{method.family}.{method.slug}")
        and found is not None
        and len(found.get("seeds", [])) >= 5
    )


def records(method: Method) -> dict[str, dict[str, Any]]:
    """Tier -> record of the trial, from the committed evidence."""
    found = evidence(method)
    if found is None:
        return {}
    tiers = {str(found.get("tier", "embedded")): found}
    if "standard" in found:
        tiers["standard"] = found["standard"]
    return tiers


def verdicts(method: Method) -> dict[str, dict[str, str]]:
    """Tier -> claim -> verdict, from the committed evidence."""
    return {tier: {c["claim"]: c["verdict"] for c in data["claims"]} for tier, data in records(method).items()}


def is_curve_point(metric: str) -> bool:
    """Whether a metric is one epoch of a curve (`e01`, `e02`, ...), which tables leave out."""
    return re.fullmatch(r"e\d+", metric) is not None


# --- plugs ----------------------------------------------------------------------------------------------------------


def load_plug(reference: str) -> Any:
    """The object behind `module:name`."""
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        if error.name and not error.name.startswith("surefoot"):
            raise MissingExtra(error.name, "all") from error
        raise


def make_treatment(text: str) -> Treatment:
    """A treatment from `slug` or `slug(name=value, ...)`; values are Python literals."""
    match = re.fullmatch(r"\s*([\w/]+)\s*(?:\((.*)\))?\s*", text, re.S)
    check(match is not None, f"{text!r} is not a treatment; write slug or slug(name=value).")
    assert match is not None
    method = find(match[1])
    if not method.treatment:
        ready = ", ".join(m.slug for m in methods() if m.treatment)
        raise InvalidInput(f"{method.slug} cannot be used as a treatment yet; these can: {ready}.")
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise InvalidInput(f"The settings in {text!r} must be name=value pairs with plain values.") from error
    return _construct(load_plug(method.treatment), settings, method.slug)


KINDS: dict[str, tuple[Any, str]] = {  # annotations of settings, as they are written
    "bool": (bool, "True or False"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a word in quotes"),
}


def _construct(kind: Any, settings: dict[str, Any], slug: str) -> Any:
    import dataclasses

    known = [f.name for f in dataclasses.fields(kind) if f.init]
    unknown = [k for k in settings if k not in known]
    check(not unknown, f"{slug} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    plain = {f.name: KINDS.get(str(f.type)) for f in dataclasses.fields(kind)}
    for name, value in settings.items():
        kinds, words = plain[name] or (object, "")
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or kinds in (bool, object))
        check(fits, f"The setting {name} of {slug} is {words}, got {value!r}.")
    return kind(**settings)


def split_stack(text: str) -> list[str]:
    """`"elr(lam=3.0, beta=0.7),tract"` -> its parts; commas inside brackets do not split."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def make_instrument(slug: str) -> Instrument:
    for entry in instruments():
        if entry.slug == slug:
            return load_plug(entry.plug)()
    raise InvalidInput(f"There is no instrument {slug!r}; there are {', '.join(e.slug for e in instruments())}.")


# --- citing ---------------------------------------------------------------------------------------------------------

FULL_VENUE = {
    "NeurIPS": "Advances in Neural Information Processing Systems",
    "ICLR": "International Conference on Learning Representations",
    "ICML": "International Conference on Machine Learning",
    "CVPR": "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    "ICCV": "IEEE/CVF International Conference on Computer Vision",
    "ECCV": "European Conference on Computer Vision",
    "AAAI": "AAAI Conference on Artificial Intelligence",
    "CPAL": "Conference on Parsimony and Learning",
}
JOURNALS = {
    "JMLR": "Journal of Machine Learning Research",
    "SIMODS": "SIAM Journal on Mathematics of Data Science",
    "ACM TOIS": "ACM Transactions on Information Systems",
    "IEEE TCSVT": "IEEE Transactions on Circuits and Systems for Video Technology",
}


def bibtex(chosen: Sequence[Method]) -> str:
    """One BibTeX entry a method."""
    return "\n\n".join(_entry(method) for method in chosen)


def _entry(method: Method) -> str:
    key = re.sub(r"\W", "", method.authors[0].split(",")[0].lower()) + f"{method.year}{method.slug.replace('_', '')}"
    if method.venue in FULL_VENUE:
        kind, where = "inproceedings", f"  booktitle = {{{FULL_VENUE[method.venue]}}},\n"
    elif method.venue in JOURNALS:
        kind, where = "article", f"  journal = {{{JOURNALS[method.venue]}}},\n"
    elif method.venue == "arXiv":
        kind, where = "misc", ""
    else:
        kind, where = "inproceedings", f"  booktitle = {{{method.venue}}},\n"
    return (
        f"@{kind}{{{key},\n  title = {{{{{method.title}}}}},\n  author = {{{' and '.join(method.authors)}}},\n{where}"
        f"  year = {{{method.year}}},\n  eprint = {{{method.arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    )
