"""NumPy's default random generator, as far as PEFT's files depend on it.

Its bits are PCG64's (https://www.pcg-random.org), seeded by way of a hash (O'Neill, "Developing a seed_seq
alternative"); some of its bounded numbers are Lemire's (https://arxiv.org/abs/1805.10941).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_32, _64, _128 = (2**bits - 1 for bits in (32, 64, 128))
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_POOL = 4


class NumpyRandom:
    """Draws what ``numpy.random.default_rng(seed)`` draws."""

    def __init__(self, seed: int):
        words = _seed_words(seed, 8)
        numbers = [words[i] | words[i + 1] << 32 for i in range(0, 8, 2)]
        self._increment = ((numbers[2] << 64 | numbers[3]) << 1 | 1) & _128
        self._state = 0
        self._step()
        self._state = (self._state + (numbers[0] << 64 | numbers[1])) & _128
        self._step()
        self._words = self._drawn_words()

    def shuffle(self, items: list[int]) -> None:
        """As ``Generator.shuffle``."""
        _shuffle(items, 1, self._masked)

    def sample(self, population: int, count: int) -> list[int]:
        """As ``Generator.choice(population, count, replace=False)``."""
        if population > 10_000 and count > population // 50:
            items = list(range(population))
            _shuffle(items, max(population - count, 1), self._scaled)
            return items[population - count :]
        chosen: dict[int, None] = {}
        for last in range(population - count, population):
            drawn = self._scaled(last)
            chosen[last if drawn in chosen else drawn] = None
        sample = list(chosen)
        _shuffle(sample, 1, self._scaled)
        return sample

    def _masked(self, largest: int) -> int:
        """A number from 0 to ``largest``: as many bits as that has, until they are no more."""
        mask = 2 ** largest.bit_length() - 1
        while (drawn := next(self._words) & mask) > largest:
            pass
        return drawn

    def _scaled(self, largest: int) -> int:
        """A number from 0 to ``largest``: 32 bits times their count, over 2 to the 32nd (Lemire)."""
        if largest == 0:
            return 0
        count = largest + 1
        product = next(self._words) * count
        if product & _32 < count:
            threshold = (2**32 - count) % count
            while product & _32 < threshold:
                product = next(self._words) * count
        return product >> 32

    def _drawn_words(self) -> Iterator[int]:
        """The generator's 64 bits, 32 at a time, the lower ones first."""
        while True:
            self._step()
            high, low = self._state >> 64, self._state & _64
            mixed, turn = high ^ low, high >> 58
            bits = (mixed >> turn | mixed << (64 - turn)) & _64
            yield bits & _32
            yield bits >> 32

    def _step(self) -> None:
        self._state = (self._state * _MULTIPLIER + self._increment) & _128


def _shuffle(items: list[int], first: int, draw: Callable[[int], int]) -> None:
    """Swap each item, from the last to the one at ``first``, with one that does not stand behind it."""
    for last in range(len(items) - 1, first - 1, -1):
        other = draw(last)
        items[last], items[other] = items[other], items[last]


def _seed_words(seed: int, count: int) -> list[int]:
    """The 32-bit words that a seed gives."""
    entropy = [seed >> shift & _32 for shift in range(0, max(seed.bit_length(), 1), 32)]
    mixing = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [mixing(word) for word in (entropy + [0] * _POOL)[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], mixing(pool[source]))
    for word in entropy[_POOL:]:
        pool = [_mix(value, mixing(word)) for value in pool]
    output = _Hash(0x8B51F9DD, 0x58F38DED)
    return [output(pool[i % _POOL]) for i in range(count)]


class _Hash:
    """A hash that is another one each time."""

    def __init__(self, constant: int, multiplier: int):
        self.constant, self.multiplier = constant, multiplier

    def __call__(self, word: int) -> int:
        word ^= self.constant
        self.constant = self.constant * self.multiplier & _32
        word = word * self.constant & _32
        return word ^ word >> 16


def _mix(a: int, b: int) -> int:
    mixed = (0xCA01F9DD * a - 0x4973F715 * b) & _32
    return mixed ^ mixed >> 16
