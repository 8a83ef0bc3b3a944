"""An index over a text that guesses how it goes on: as it did where its latest ids stood before.

It is a suffix automaton (Blumer et al., 1985), which grows by an id in amortized constant time. A state stands for the
substrings that end at the same places; its edges are the ids that followed there. How often each of them did is counted
in the state of the longest repeated end alone, as in PPM's update exclusion: where a longer context was there, a
shorter one has learnt nothing.
"""

# A guess goes on while, by its counts and by how much text it rests on, it is at least this likely.
LEAST_LIKELY = 0.2
# A repeated end of fewer ids says nothing.
SHORTEST = 2


class Suffixes:
    """Where the ends of a text have stood before."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        # By state, of which 0 is the empty string: the edges, the state of the longest end that stands at more places,
        # the longest string, and how often each id followed.
        self.edges: list[dict[int, int]] = [{}]
        self.links, self.lengths = [-1], [0]
        self.counts: list[dict[int, int]] = [{}]
        self.last = 0  # the whole text's state

    def extend(self, ids: list[int]) -> None:
        for i in ids:
            self._append(i)

    def _add_state(self, length: int, like: int | None = None) -> int:
        self.edges.append({} if like is None else dict(self.edges[like]))
        self.counts.append({} if like is None else dict(self.counts[like]))
        self.links.append(-1 if like is None else self.links[like])
        self.lengths.append(length)
        return len(self.lengths) - 1

    def _append(self, i: int) -> None:
        edges, links, lengths = self.edges, self.links, self.lengths
        self.ids.append(i)
        state, new = self.last, self._add_state(len(self.ids))
        repeated = max(0, links[state])  # the longest end of the text so far that has stood before
        while state >= 0 and i not in edges[state]:
            edges[state][i] = new
            state = links[state]
        if state < 0:
            links[new] = 0
        elif lengths[target := edges[state][i]] == lengths[state] + 1:
            links[new] = target
        else:  # only the shorter strings of that state end here too: they become a state of their own
            short = self._add_state(lengths[state] + 1, like=target)
            links[target] = links[new] = short
            while state >= 0 and edges[state].get(i) == target:
                edges[state][i] = short
                state = links[state]
        counts = self.counts[repeated]
        counts[i] = counts.get(i, 0) + 1
        self.last = new

    def continuation(self, most: int) -> list[int]:
        """Return up to `most` ids that are likely to follow; [] where the end of the text is new."""
        state = max(0, self.links[self.last])
        matched, likelihood = self.lengths[state], 1.0
        found: list[int] = []
        while len(found) < most:
            while state > 0 and not self.edges[state]:  # the text ends here: go on as it did after a shorter end
                state = self.links[state]
                matched = min(matched, self.lengths[state])
            if matched < SHORTEST:
                break
            edges, counts = self.edges[state], self.counts[state]
            # An edge was followed once more than was counted: when it was new. Of equals, the latest.
            best = max(reversed(edges), key=lambda i: counts.get(i, 0))
            share = (counts.get(best, 0) + 1) / (len(edges) + sum(counts.values()))
            likelihood *= share * matched / (matched + 1)
            if likelihood < LEAST_LIKELY:
                break
            found.append(best)
            state, matched = edges[best], matched + 1
        return found
