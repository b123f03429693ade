"""What judging finds: right, wrong or unjudged, each with a reason.

A reason is a stable word for programs; `SENTENCES` has the sentence for people.
"""

from __future__ import annotations

from dataclasses import dataclass

SENTENCES = {
    # right
    "equal": "both are written alike",
    "equal_number": "both are the same number",
    "equal_value": "both have the same value",
    "equal_rounded": "one is the other, rounded to six or more digits",
    "within_tolerance": "the number lies within the tolerance of the measured one",
    "equal_parts": "both are made of the same parts",
    "equal_words": "both are the same words",
    # wrong
    "no_answer": "the text states no answer",
    "other_number": "it is another number",
    "other_value": "it has another value",
    "out_of_tolerance": "the number lies outside the tolerance of the measured one",
    "other_parts": "a part of it differs",
    "other_count": "it has more or fewer parts",
    "other_kind": "it is another kind of thing, a set and not a pair, say",
    "other_ends": "the interval includes an end that the other leaves out, or the reverse",
    "other_unit": "it is in another unit",
    "other_base": "it is written to another base",
    "other_variable": "it gives a value to another variable",
    "other_words": "it is other words",
    "other_text": "it is another text",
    "unreadable_answer": "the stated answer cannot be read as mathematics",
    # unjudged
    "unreadable_gold": "the gold answer cannot be read as mathematics",
    "empty_gold": "the gold answer is empty",
    "unknown_unit": "the numbers agree and what they count is named differently",
    "order_of_names": "the values agree in one order of their names and not in the other",
    "percent_of_less_than_one": "one is the other with a percent sign, and may mean a hundredth",
    "proportional": "both are the same ratio, and may be times of day",
    "prose": "the answer names the gold answer in a sentence that may mean something else",
    "equal_in_part": "both agree for positive values of their variables only",
    "too_long": "the stated answer is too long to be judged",
    "request_timed_out": "the time limit of the whole request ran out before",
    "timed_out": "judging took longer than its time limit",
    "out_of_memory": "judging needs more memory than its limit",
    "too_deep": "the answer is nested too deeply to judge",
    "process_died": "the judging process died",
    "needs_mathematics": "it takes mathematics to tell",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """`value`: True right, False wrong, None unjudged."""

    value: bool | None
    reason: str

    @property
    def deferred(self) -> bool:
        """Not judged yet, and mathematics may tell."""
        return self.reason == "needs_mathematics"


def right(reason: str) -> Finding:
    return Finding(True, reason)


def wrong(reason: str) -> Finding:
    return Finding(False, reason)


def unjudged(reason: str) -> Finding:
    return Finding(None, reason)


DEFERRED = unjudged("needs_mathematics")
