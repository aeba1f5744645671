"""Who met which items, in time order, and how their histories are split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Histories:
    """The items that each user met, in time order.

    Attributes:
        users: their names.
        items: for each user int64 ``[n]``, rows of the catalogue.
        times: for each user float64 ``[n]``; None where the file has none.
    """

    users: list[str]
    items: list[np.ndarray]
    times: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def interactions(self) -> int:
        return sum(map(len, self.items))


@dataclass
class Examples:
    """Next-item examples: after `histories[i]`, user `users[i]` met `targets[i]`; all are rows of the catalogue."""

    users: list[str]
    histories: list[np.ndarray]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def last(self, max_items: int) -> Examples:
        """The same with histories cut to their last `max_items` items."""
        return Examples(self.users, [history[-max_items:] for history in self.histories], self.targets)

    def sample(self, count: int | None, seed: int = 0) -> Examples:
        """`count` examples chosen by `seed`, in their order; all of them where there are no more."""
        if count is None or count >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        return Examples([self.users[i] for i in chosen], [self.histories[i] for i in chosen], self.targets[chosen])


@dataclass
class Split:
    """Histories to train on, and examples to choose and to judge a model by."""

    train: Histories
    validation: Examples
    test: Examples


def leave_two_out(histories: Histories) -> Split:
    """Each user's last item is the test target, the one before it the validation target; the rest is for training.

    Users with fewer than three items only train.

    Raises:
        ValueError: no user has three items.
    """
    train = Histories(list(histories.users), [_but(items, 2) if len(items) > 2 else items for items in histories.items])
    held = [(user, items) for user, items in zip(histories.users, histories.items, strict=True) if len(items) > 2]
    if not held:
        longest = max(map(len, histories.items))
        raise ValueError(
            f"interactions: leave-two-out needs users with 3 items or more; the longest history has {longest}"
        )
    users = [user for user, _ in held]
    validation, test = (
        Examples(users, [_but(items, back) for _, items in held], np.array([items[-back] for _, items in held]))
        for back in (2, 1)
    )
    return Split(train, validation, test)


def split_by_time(histories: Histories, fractions: tuple[float, float] = (0.8, 0.9)) -> Split:
    """Train on what happened before one moment, validate on what came between it and a second, test on the rest.

    A user gives one example a part at most: the first item met in it, after all that was met before it.

    Args:
        histories: with times.
        fractions: shares of all interactions that happened before the two moments.

    Raises:
        ValueError: there are no times, or a part is left empty.
    """
    if histories.times is None:
        raise ValueError(
            "split = 'time' needs a timestamp column in interactions; give one, or split = 'leave-two-out'"
        )
    first, second = np.quantile(np.concatenate(histories.times), fractions)
    users, kept, examples = [], [], ([], [])
    for user, items, times in zip(histories.users, histories.items, histories.times, strict=True):
        ends = np.searchsorted(times, (first, second, np.inf), side="left")
        if ends[0]:
            users.append(user)
            kept.append(items[: ends[0]])
        for part, (start, stop) in zip(examples, ((ends[0], ends[1]), (ends[1], ends[2])), strict=True):
            if 0 < start < stop:
                part.append((user, items[:start], items[start]))
    for name, part in zip(("validation", "test"), examples, strict=True):
        if not part or not users:
            raise ValueError(
                f"split = 'time' at {first:g} and {second:g} leaves no {name} example; change time_fractions"
            )
    return Split(
        Histories(users, kept),
        *(Examples([u for u, _, _ in p], [h for _, h, _ in p], np.array([t for _, _, t in p])) for p in examples),
    )


def _but(items: np.ndarray, count: int) -> np.ndarray:
    return items[: len(items) - count]
