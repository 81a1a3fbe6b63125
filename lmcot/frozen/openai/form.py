"""How requests are written for one endpoint: parameters renamed, dropped and added."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from lmcot.config import OpenAIFrozen
from lmcot.config.frozen import DroppedParameter, RequestParameter

_LIMIT_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_UNKNOWN = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown|unexpected|deprecated|extra|not (?:\w+ ){0,2}"
    r"(?:supported?|permitted|allowed|available|accepted|recogni[sz]ed|implemented)"
    r"|(?:no|n't|cannot) support|does not accept|no longer",
    re.IGNORECASE,
)
_OF_VALUE = re.compile(
    r"at least|at most|minimum|maximum|greater|less than|larger|smaller|too (?:large|small|long|"
    r"many|few)|exceed|>=|<=|context (?:length|window|size)",
    re.IGNORECASE,
)
_LOST = {
    "temperature": "the endpoint's own temperature applies, so replies to the same prompt may "
    "differ: a run does not repeat, and they are not kept in the cache",
    "seed": "the samples of a vote do not repeat, and are not kept in the cache; if the endpoint "
    "has another name for it, set frozen.rename_parameters (Mistral: {seed: random_seed})",
    "stop": "replies are cut here instead",
}


@dataclass(frozen=True, slots=True)
class RequestForm:
    """The changes that are made to each request before it is sent."""

    renamed: Mapping[str, str]
    dropped: tuple[str, ...]
    extra: Mapping[str, Any]

    @staticmethod
    def of(settings: OpenAIFrozen) -> RequestForm:
        """The form that the settings name."""
        renamed = {str(name): other for name, other in settings.rename_parameters.items()}
        return RequestForm(renamed, settings.drop_parameters, settings.extra_body)

    def into(self, settings: OpenAIFrozen) -> OpenAIFrozen:
        """The settings with this form."""
        return settings.model_copy(
            update={"rename_parameters": dict(self.renamed), "drop_parameters": self.dropped}
        )

    def name(self, parameter: str) -> str:
        """The name that the endpoint uses for a parameter."""
        return self.renamed.get(parameter, parameter)

    def written(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request in this form."""
        kept = {self.name(key): one for key, one in body.items() if key not in self.dropped}
        return {**kept, **self.extra}

    def repeats(self, temperature: float, seed: int | None) -> bool:
        """Whether the same request gets the same reply again."""
        greedy = temperature == 0 and "temperature" not in self.dropped
        return greedy or (seed is not None and "seed" not in self.dropped)

    def notices(self, since: RequestForm) -> Iterator[str]:
        """A line for the user about each change."""
        for parameter, name in self.renamed.items():
            if since.renamed.get(parameter) != name:
                was = since.name(parameter)
                yield f"the endpoint refuses '{was}': the run sends '{name}' instead"
        for parameter in self.dropped:
            if parameter not in since.dropped:
                yield f"the endpoint refuses '{parameter}': {_LOST[parameter]}"

    def next_by_name(self, body: Mapping[str, Any], said: str) -> RequestForm | None:
        """The form to try after a refusal that names a parameter of the request.

        None if it names none, or if it concerns the value of the limit and not its name.
        """
        for parameter in get_args(RequestParameter):
            if parameter not in body or parameter in self.dropped:
                continue
            if not _names(self.name(parameter), said):
                continue
            if parameter in get_args(DroppedParameter):
                return self._without(parameter)
            other = _LIMIT_NAMES.get(self.name(parameter))
            by_name = bool(_UNKNOWN.search(said)) and not _OF_VALUE.search(said)
            if other is not None and (by_name or _word(other).search(said)):
                return self._with_limit(other)
        return None

    def others(self, body: Mapping[str, Any]) -> Iterator[RequestForm]:
        """Forms to try after a refusal that names nothing: one change each, then all at once."""
        everything = self
        for parameter in ("stop", "seed", "max_tokens", "temperature"):
            if parameter not in body or parameter in self.dropped:
                continue
            if parameter == "max_tokens":
                other = _LIMIT_NAMES.get(self.name(parameter))
                if other is not None:
                    yield self._with_limit(other)
                    everything = everything._with_limit(other)
            else:
                yield self._without(parameter)
                everything = everything._without(parameter)
        yield everything

    def _without(self, parameter: str) -> RequestForm:
        return replace(self, dropped=(*self.dropped, parameter))

    def _with_limit(self, name: str) -> RequestForm:
        return replace(self, renamed={**self.renamed, "max_tokens": name})

    def digest_of(self) -> str:
        """The parts of the form that replies depend on, as text; empty if there are none."""
        lost = sorted({"temperature", "seed"} & set(self.dropped))
        if not lost and not self.extra:
            return ""
        return json.dumps([lost, self.extra], sort_keys=True, default=str)


def complains_of_length(said: str) -> bool:
    """Whether a refusal is about the number of tokens of the reply or the prompt."""
    return bool(re.search(r"max_\w*tokens|max_new_tokens", said) and _OF_VALUE.search(said))


def _names(name: str, said: str) -> bool:
    """Whether a refusal is about a parameter.

    ``stop`` and ``seed`` are ordinary words, so they must be quoted or be called a parameter.
    """
    if name not in ("stop", "seed"):
        return bool(_word(name).search(said))
    about = r"parameters?|arguments?|fields?|inputs?|sequences?|strings?|values?"
    pattern = (
        rf"['\"`.\[]{name}['\"`\]]|\b(?:{about}):? {name}\b|\b{name} (?:{about}|is|are|was|must)\b"
        rf"|(?:{_UNKNOWN.pattern})\W+(?:\w+\W+)?{name}\b|\b{name}: "
    )
    return bool(re.search(pattern, said, re.IGNORECASE))


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
