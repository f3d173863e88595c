"""Covering arrays: few cases in which every two values that can meet do meet. Plain functions of their arguments.

A factor has values; a case takes one of each. Some pairs of values are forbidden. Greedy: each case starts from a pair
that no case has had yet, and takes of each other factor the value that brings most new pairs, going back where that
leaves no way to complete the case.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

Value = tuple[str, str]  # (factor, value)
Pair = frozenset[Value]
Case = dict[str, str]

Factors = Mapping[str, Sequence[str]]


def all_pairs(factors: Factors) -> list[Pair]:
    """Every two values of two factors, in the order in which they are named."""
    return [
        frozenset({(one, a), (other, b)})
        for one, other in combinations(factors, 2)
        for a in factors[one]
        for b in factors[other]
    ]


def pairs_of(case: Mapping[str, str]) -> set[Pair]:
    return {frozenset(two) for two in combinations(case.items(), 2)}


def completed(case: Case, factors: Factors, forbidden: Collection[Pair], wanted: Collection[Pair]) -> Case | None:
    """The case with a value of each factor and no forbidden pair, preferring values that bring `wanted` pairs; None if
    there is none."""
    left = [factor for factor in factors if factor not in case]
    if not left:
        return case
    factor, options = left[0], []
    for rank, value in enumerate(factors[left[0]]):
        new = {frozenset({(factor, value), taken}) for taken in case.items()}
        if not new & set(forbidden):
            options.append((-len(new & set(wanted)), rank, value))
    for _, _, value in sorted(options):
        found = completed(case | {factor: value}, factors, forbidden, wanted)
        if found is not None:
            return found
    return None


def covering_array(factors: Factors, forbidden: Collection[Pair]) -> tuple[list[Case], list[Pair]]:
    """Cases in which every pair occurs that can, and the pairs that cannot although they are not forbidden."""
    wanted = dict.fromkeys(pair for pair in all_pairs(factors) if pair not in forbidden)
    cases: list[Case] = []
    impossible: list[Pair] = []
    while wanted:
        pair = next(iter(wanted))
        start = {factor: value for factor, value in pair}
        case = completed({f: start[f] for f in factors if f in start}, factors, forbidden, wanted)
        if case is None:
            impossible.append(pair)
            del wanted[pair]
            continue
        cases.append({factor: case[factor] for factor in factors})
        for met in pairs_of(case):
            wanted.pop(met, None)
    return cases, impossible
