"""The evaluation's report in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmcot.config.rows import BASELINE, REASONING, find_row
from lmcot.evaluation.costs import large_tokens, size_in_words

_SCORES = (("em", "EM"), ("f1", "F1"), ("inclusion", "inclusion"))
_LARGEST = 100.0
"""The largest difference that there can be, in points."""


def markdown(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        pictures: file names by what they show.
    """
    parts = [
        "# Evaluation",
        _scores(report),
        _pictures(pictures, "Accuracy by row"),
        _comparisons(report),
        _rationales(report),
        _pictures(pictures, "Rationales by aspect"),
        _costs(report),
        _pictures(pictures, "Accuracy against the large LM's tokens"),
        _estimate(report.get("estimate", {})),
        _breakdown(report, "type"),
        _breakdown(report, "level"),
        _pictures(pictures, "Reward and KL over training"),
        _settings(report),
        _notes(report["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores(report: Mapping[str, Any]) -> str:
    lines = [
        "| row | what | EM | F1 | inclusion | n | empty | cut |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for name, row in report["rows"].items():
        scores = " | ".join(_score(row, metric) for metric, _ in _SCORES)
        counts = f"{row['n']} | {row['empty']} | {row['cut']}"
        lines.append(f"| `{name}` | {_cell(row['label'])} | {scores} | {counts} |")
    bootstrap = report["bootstrap"]
    return (
        "\n".join(lines)
        + f"\n\nIn brackets: the {_level(report)} interval of the mean in percent, "
        f"from {bootstrap['samples']:,} bootstrap resamples of the questions; it covers the choice "
        "of questions, not that of the training seed. *Empty* and *cut* count the questions among "
        "n that got no answer, because none was in the reply or because a limit of tokens cut it "
        "before the answer was said; both score 0 unless what there is fits."
    )


def no_answers(empty: int, cut: int) -> str:
    """The number of missing answers, to end a sentence with; empty if none is missing."""
    told = [f"{count} {what}" for count, what in ((empty, "empty"), (cut, "cut")) if count]
    return f"; {', '.join(told)}" if told else ""


def _comparisons(report: Mapping[str, Any]) -> str:
    if not report["tests"]:
        return ""
    lines = [
        "## What differs",
        "",
        "| rows | n | EM, points | p | McNemar's p | could be seen | F1, points | p |",
        "|---|---:|---|---:|---:|---:|---|---:|",
    ]
    for test in report["tests"]:
        em, f1 = test["em"], test["f1"]
        lines.append(
            f"| `{test['first']}` - `{test['second']}` | {test['n']} | {_difference(em)} "
            f"| {_p(em['p'])} | {_p(em['mcnemar'])} | {_seen(em)} | {_difference(f1)} "
            f"| {_p(f1['p'])} |"
        )
    sentences = [_sentence(test, report) for test in report["tests"] if _matters(test)]
    explained = (
        f"Paired on the same questions, with {_level(report)} intervals; p from the bootstrap "
        "under the null and from McNemar's exact test, not corrected for the number of "
        "comparisons. *Could be seen*: the smallest true difference that this many questions "
        "show in four of five cases (80% power); *none* if that is more than 100 points."
    )
    return "\n".join([*lines, "", explained, *([""] if sentences else []), *sentences])


def _matters(test: Mapping[str, Any]) -> bool:
    first, second = find_row(test["first"]), find_row(test["second"])
    return first.kind == "guided" and first.voteless != second.voteless


def _sentence(test: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    em = test["em"]
    level = 1 - report["bootstrap"]["confidence"]
    names = f"- `{test['first']}` against `{test['second']}`: "
    size = f"{abs(em['difference']):.1f} points of EM"
    if em["p"] <= level and em["difference"]:
        better = "better" if em["difference"] > 0 else "worse"
        return f"{names}{better} by {size} (p {_is(em['p'])})."
    seen = em["detectable"]
    if seen is not None and seen > _LARGEST:
        limit = f" These {test['n']} questions cannot show any difference, however large."
    else:
        limit = f" A difference under {seen:.0f} points could well be missed." if seen else ""
    return (
        f"{names}no difference is shown ({em['difference']:+.1f} points, p {_is(em['p'])}).{limit}"
    )


def _rationales(report: Mapping[str, Any]) -> str:
    rows = {
        name: row
        for name, row in report["rows"].items()
        if row.get("contains_gold") is not None or row.get("vote_share") is not None
    }
    lines = []
    if rows:
        lines = [
            "## Rationales",
            "",
            "| row | holds the gold answer | copied from the context | votes for the answer |",
            "|---|---:|---:|---:|",
            *(
                f"| `{name}` | {_share(row['contains_gold'])} | {_share(row['copied'])} "
                f"| {_share(row['vote_share'])} |"
                for name, row in rows.items()
            ),
            "",
            "*Copied*: the share of a rationale's words that stand in eight or more words taken "
            "from the context in a row.",
        ]
    aspects = report["aspects"]
    if aspects:
        names = [name for name in next(iter(aspects.values())) if name != "n"]
        lines += [
            *([""] if lines else ["## Rationales", ""]),
            f"| policy | {' | '.join(names)} | n |",
            f"|---|{'---:|' * len(names)}---:|",
            *(
                f"| {policy} | {' | '.join(f'{scores[name]:.2f}' for name in names)} "
                f"| {scores['n']:.0f} |"
                for policy, scores in aspects.items()
            ),
        ]
    return "\n".join(lines)


def _costs(report: Mapping[str, Any]) -> str:
    costs = report["costs"]
    sizes = [str(size) for size in costs["sizes"]]
    lines = [
        "## Costs of a question",
        "",
        "| row | large LM: tokens in / out | small LM: tokens in / out | requests (from the cache) "
        "| seconds | FLOPs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in costs["rows"].items():
        total = next(iter(row["flops"].values())) if not row["requests"] else None
        total = row["flops"].get(str(costs["large"]), total)
        lines.append(
            f"| `{name}` | {row['large_lm_tokens_in']:,.0f} / {row['large_lm_tokens_out']:,.0f} "
            f"| {row['small_lm_tokens_in']:,.0f} / {row['small_lm_tokens_out']:,.0f} "
            f"| {row['requests']:.1f} ({row['cached_requests']:.1f}) | {row['seconds']:.2f} "
            f"| {'unknown' if total is None else f'{total:.2g}'} |"
        )
    large = (
        f"has {size_in_words(costs['large'])} parameters"
        if costs["large"]
        else ("is of a size that is not known (`frozen.parameters`)")
    )
    lines += [
        "",
        f"FLOPs: 2 for each parameter and token, read or written; the large LM {large}, the small "
        f"one has {size_in_words(costs['small'])} parameters. Tokens of replies that came "
        "from the cache count as if they had been asked for; seconds are what this run took.",
    ]
    rows = costs["rows"]
    if REASONING in rows:
        others = {name: row for name, row in rows.items() if name != REASONING}
        lines += [*_shares(others, REASONING, "of_cot", sizes), *_break_evens(others)]
    cheaper = {name for name, row in rows.items() if _spares(name, row, rows)}
    if cheaper:
        others = {name: row for name, row in rows.items() if name != BASELINE}
        lines += [
            *_shares(others, BASELINE, "of_standard", sizes),
            *(_spared(name, row, rows[BASELINE]) for name, row in rows.items() if name in cheaper),
        ]
    return "\n".join(lines)


def _estimate(estimate: Mapping[str, Any]) -> str:
    """What the run was expected to take, what it took, and by how much that is more."""
    if not estimate.get("stages"):
        return ""
    currency = estimate["currency"]
    lines = [
        "## What was expected",
        "",
        "| stage | hours | taken | error | frozen LM's tokens | taken | error "
        f"| {currency} | taken |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for stage, one in estimate["stages"].items():
        told, took = one["estimated"], one["taken"]
        hours = [None if x["seconds"] is None else x["seconds"] / 3600 for x in (told, took)]
        tokens = [x["frozen_tokens"] for x in (told, took)]
        cost = [x["cost"] for x in (told, took)]
        lines.append(
            f"| {stage} | {_amount(hours[0])} | {_amount(hours[1])} | {_error(*hours)} "
            f"| {tokens[0]:,.0f} | {tokens[1]:,.0f} | {_error(*tokens)} "
            f"| {_amount(cost[0])} | {_amount(cost[1])} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "*Error* is how far the estimate was above what the stage took, in percent of that. "
            "Hours are those of the work, without the start of actors and of steps that were "
            "repeated.",
        ]
    )


def _amount(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.3g}"


def _error(estimated: float | None, taken: float | None) -> str:
    if estimated is None or not taken:
        return ""
    return f"{100 * (estimated / taken - 1):+.0f}%"


def _shares(
    rows: Mapping[str, Mapping[str, Any]], other: str, key: str, sizes: Sequence[str]
) -> list[str]:
    return [
        "",
        f"FLOPs of a question in percent of `{other}`'s, for a large LM of:",
        "",
        f"| row | {' | '.join(size_in_words(float(size)) for size in sizes)} |",
        f"|---|{'---:|' * len(sizes)}",
        *(_share_of(name, row[key]) for name, row in rows.items()),
        "",
    ]


def _share_of(name: str, shares: Mapping[str, float]) -> str:
    return f"| `{name}` | {' | '.join(f'{100 * share:.0f}%' for share in shares.values())} |"


def _break_evens(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for name, costs in rows.items():
        if find_row(name).kind != "guided":
            continue
        if costs["break_even"] is None:
            yield (
                f"- `{name}` is not cheaper than chain of thought by the large LM, whatever its "
                "size: it spares the large LM no tokens."
            )
        else:
            yield (
                f"- `{name}` is cheaper than chain of thought by a large LM of more than "
                f"{size_in_words(costs['break_even'])} parameters."
            )


def _spares(name: str, row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a policy's guidance spares the large LM tokens even against the baseline."""
    if BASELINE not in rows or find_row(name).kind != "guided":
        return False
    return large_tokens(row) < large_tokens(rows[BASELINE])


def _spared(name: str, row: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    mine, theirs = large_tokens(row), large_tokens(baseline)
    return (
        f"- `{name}` takes {mine:,.0f} tokens of the large LM, {100 * mine / theirs:.0f}% of the "
        f"{theirs:,.0f} of `{BASELINE}`: it is cheaper than that for a large LM of more than "
        f"{size_in_words(row['break_even_of_standard'])} parameters."
    )


def _breakdown(report: Mapping[str, Any], what: str) -> str:
    rows = {name: row["by"][what] for name, row in report["rows"].items()}
    names = sorted({name for groups in rows.values() for name in groups})
    if len(names) < 2:
        return ""
    counts = {
        name: max(groups[name]["n"] for groups in rows.values() if name in groups) for name in names
    }
    heads = [f"{_cell(name)} (n = {counts[name]})" for name in names]
    lines = [
        f"## By {what} of question",
        "",
        f"EM / F1, in percent.\n\n| row | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for row, groups in rows.items():
        cells = [
            f"{groups[name]['em']:.1f} / {groups[name]['f1']:.1f}" if name in groups else ""
            for name in names
        ]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(report: Mapping[str, Any]) -> str:
    lines = [f"- {name}: `{_named(value)}`" for name, value in report["settings"].items()]
    return "\n".join(["## What was evaluated", "", *lines]) if lines else ""


def _named(value: Any) -> Any:
    """The setting that names a section, such as a data set's path; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    return next((value[key] for key in ("source", "model", "path", "kind") if key in value), value)


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(["## Notes", "", *(f"- {note}" for note in notes)]) if notes else ""


def _pictures(pictures: Mapping[str, str], what: str) -> str:
    return f"![{what}]({pictures[what]})" if what in pictures else ""


def _score(row: Mapping[str, Any], metric: str) -> str:
    low, high = row["ci"][metric]
    return f"{row[metric]:.1f} [{low:.1f}, {high:.1f}]"


def _difference(one: Mapping[str, Any]) -> str:
    return f"{one['difference']:+.1f} [{one['low']:+.1f}, {one['high']:+.1f}]"


def _seen(one: Mapping[str, Any]) -> str:
    if one["detectable"] is None:
        return ""
    return "none" if one["detectable"] > _LARGEST else f"{one['detectable']:.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _is(value: float) -> str:
    return _p(value) if value < 0.001 else f"= {_p(value)}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}%"


def _level(report: Mapping[str, Any]) -> str:
    return f"{100 * report['bootstrap']['confidence']:g}%"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
