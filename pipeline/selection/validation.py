"""Validation suites: a suite file, asked on the prompts that choices are made on.

A suite file says what is reported, on the test split as a rule. What sites and strengths are chosen
on must be other prompts, so every suite asks the rows of the validation split of the same files in
place of those that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import InvalidInput
from pipeline.evaluation.suite_file import SuiteFile, SuiteSection, build_suites, load_suite_file
from pipeline.evaluation.suites import AnySuite, Suite
from store.digest import sha256_hex


@dataclass(frozen=True, slots=True)
class ValidationFile:
    """The suites of a file that a selection asks, on their validation rows.

    Attributes:
        targets: What steering should raise; at least one.
        harms: What should stay low.
        fluency: Whose plain answers must stay probable; the first of the file, or None.
    """

    file: SuiteFile
    targets: tuple[SuiteSection, ...]
    harms: tuple[SuiteSection, ...]
    fluency: SuiteSection | None

    @classmethod
    def load(cls, path: Path, *, targets: Sequence[str] = (), most: int) -> ValidationFile:
        """Read a suite file.

        Args:
            targets: Names of the suites that steering should raise; by default all of the role
                ``target``.
            most: Prompts of each suite, at most.

        Raises:
            InvalidInput: As `load_suite_file`; no target; or a target without a share.
            NotFound: No suite has a name of `targets`.
        """
        # Also says which names there are, where one is wrong.
        load_suite_file(path, targets)
        file = load_suite_file(path)
        chosen = [s for s in file.suites if (s.name in targets if targets else s.role == "target")]
        if not chosen:
            raise InvalidInput(
                f'suite file {str(path)!r}: no suite has role = "target", which is what a '
                "selection raises; give one that role, or name it with --target",
                kind="suite_target",
            )
        for suite in chosen:
            if suite.kind == "fluency":
                raise InvalidInput(
                    f"suite {suite.name!r}: perplexity is what is capped, not what is raised; name "
                    "a target of another kind",
                    kind="suite_target",
                )
        harms = [s for s in file.suites if s.role == "harm" and s.kind != "fluency"]
        fluency = [s for s in file.suites if s.kind == "fluency"][:1]
        moved = {s.name: _moved(s, most) for s in (*chosen, *harms, *fluency)}
        return cls(
            file,
            tuple(moved[s.name] for s in chosen),
            tuple(moved[s.name] for s in harms if s not in chosen),
            moved[fluency[0].name] if fluency else None,
        )

    def record(self) -> dict[str, Any]:
        """Everything that the suites' values depend on, as JSON: part of a selection's name."""
        return {
            "validation_share": self.file.validation_share,
            "test_share": self.file.test_share,
            "targets": [_record(section) for section in self.targets],
            "harms": [_record(section) for section in self.harms],
            "fluency": None if self.fluency is None else _record(self.fluency),
        }

    def build(
        self, sections: Sequence[SuiteSection], model: nn.Module, tokenizer: Any
    ) -> list[AnySuite]:
        """Their suites, without probabilities of choices: answers are generated, and judged."""
        file = self.file.model_copy(update={"suites": list(sections)})
        return [s for s in build_suites(file, model, tokenizer) if s.metric != "probability"]

    def refusal_judge(self, model: nn.Module, tokenizer: Any) -> Callable[[str], bool]:
        """Tells refusals, by the phrases of the first target that has some.

        Raises:
            InvalidInput: No target is of kind ``refusal``.
        """
        refusals = [section for section in self.targets if section.kind == "refusal"]
        if not refusals:
            raise InvalidInput(
                'the suite file has no target of kind = "refusal", whose phrases tell a refusal; '
                "add one, or choose by another way than --by refusal",
                kind="suite_target",
            )
        (suite,) = self.build(refusals[:1], model, tokenizer)
        assert isinstance(suite, Suite)
        # A refusal is told by its own words, whichever prompt it answers.
        return lambda answer: suite.is_hit(0, answer)


def _moved(section: SuiteSection, most: int) -> SuiteSection:
    return section.model_copy(update={"split": "validation", "limit": min(section.limit, most)})


def _record(section: SuiteSection) -> dict[str, Any]:
    fields = section.model_dump(mode="json", exclude={"name", "role", "files", "phrases"})
    return fields | {
        "files": [sha256_hex(path.read_bytes()) for path in section.files],
        "phrases": None if section.phrases is None else sha256_hex(section.phrases.read_bytes()),
    }
