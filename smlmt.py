"""
Few-shot tasks cut from plain text: subset masked language modelling tasks, SMLMT (Bansal et al. 2020, EMNLP, 2020.emnlp-main.38).

Choose N words. For each, find K + Q places in the text where it stands, and blank it out there. K of these windows, the support, are shown
with the answer; the other Q, the query, ask for it. The answer is not the word but a label 0..N-1, dealt out anew in every task (episode),
so there is nothing to remember from one task to the next. What can be learnt over many of them is how to learn a word from K examples.

Departures from the paper: a window holds its word once, in any spelling, and so has one blank; support and query windows of a word come
from different documents, or failing that stand FAR tokens apart; a tenth of all words is never trained on; an episode is a pure function
of (text, seed, index), so that runs can be resumed and compared.

    python smlmt.py [corpus folder]    prints one small task
"""

import textwrap
import zlib
from dataclasses import dataclass

import numpy as np

MIN_WINDOW = 16  # tokens, the blank among them: with fewer there is too little to go by
FAR = 2048       # least number of tokens between two windows of a word that occurs in too few documents
STRETCHES = 64   # pieces of the corpus that make up a pool


@dataclass(frozen=True)
class Episode:
    """One task of N words, K support and Q query windows each. The rows of a label stand beside each other."""
    support: np.ndarray         # (N*K, L) token ids: text with one <|mask|> for the word, end-of-text where the window is over
    support_labels: np.ndarray  # (N*K,) 0..N-1
    support_pos: np.ndarray     # (N*K,) the column where the features are read
    query: np.ndarray           # (N*Q, L)
    query_labels: np.ndarray    # (N*Q,)
    query_pos: np.ndarray       # (N*Q,)
    words: np.ndarray           # (N,) label c stands for the word of token id words[c]
    far_share: float            # share of the words whose support and query windows have no document in common


def words_of(text):
    """The words of a text are its longest runs of letters, case folded: "The np.array's" has the, np, array and s."""
    return [word.casefold() for word in "".join(c if c.isalpha() else " " for c in text).split()]


def is_heldout(word):
    """A fixed tenth of all words, the same in every corpus and for every seed, is never used in training."""
    return zlib.crc32(word.encode()) % 10 == 0


def generator(seed, *index):
    """Random numbers of their own for each (seed, *index), whose parts are ints or tuples of ints, whatever was drawn before."""
    numbers = []
    for part in (seed, *index):
        part = part if isinstance(part, tuple) else (part,)
        numbers += [len(part), *map(int, part)]  # the length too, because to NumPy (1,) and (1, 0) are the same seed
    return np.random.default_rng(numbers)


def distinct(rng, sizes, k):
    """k different integers below each of `sizes` (n,), in random order: (n, k). Floyd's algorithm (CACM 30(9), 1987), all rows at once."""
    chosen = np.empty((len(sizes), k), np.int64)
    for i in range(k):
        last = sizes - k + i
        guess = rng.integers(last + 1)
        taken = (chosen[:, :i] == guess[:, None]).any(1)
        chosen[:, i] = np.where(taken, last, guess)
    return rng.permuted(chosen, axis=1)


def changes(*columns):
    """(n,) bool: where a row differs from the one before it in any of the `columns`, arrays (n,) of nonnegative integers."""
    return np.any([np.diff(column, prepend=-1) != 0 for column in columns], axis=0)


# -----------------------------------------------------------------------------
# the pool

def pool(tokens, pool_tokens, seed, refresh, *, eot):
    """
    The text that a sampler works on from one refresh to the next, as an array in memory: all of `tokens` (a memmap, say) where these are
    no more than `pool_tokens`, else about that many of them, chosen by `seed` (int or tuple of ints) and `refresh` alone.

    The corpus is divided into equal cells, of which STRETCHES are drawn. A cell stands for the documents that start in it, so that the
    pieces are cut at document boundaries and no text is out of reach.
    """
    if len(tokens) <= pool_tokens:
        return np.array(tokens)
    if pool_tokens < STRETCHES:
        raise ValueError(f"pool_tokens={pool_tokens} must be at least {STRETCHES}")

    def next_document(i, block=2**16):  # where the first document at or after token i starts
        while 0 < i < len(tokens):
            ends = np.flatnonzero(tokens[i - 1 : i - 1 + block] == eot)
            if len(ends):
                return i + int(ends[0])
            i += block
        return min(i, len(tokens))

    cell = pool_tokens // STRETCHES
    cells = np.sort(generator(seed, refresh).choice(-(-len(tokens) // cell), STRETCHES, replace=False))
    text = np.concatenate([tokens[next_document(c * cell) : next_document((c + 1) * cell)] for c in cells.tolist()])
    if len(text) == 0:
        raise ValueError(f"pool_tokens={pool_tokens} is too small: no document starts in its {STRETCHES} stretches; raise pool_tokens")
    return text


class Sampler:
    """
    Draws episodes from a pool of text. Making one reads the pool and indexes it; an episode then is a few gathers.

    tokens         (n,) unsigned integers: the pool, its documents ended by the id `eot`
    token_bytes    the bytes of each ordinary token, by id
    mask           the id that stands for the blank; not to be found in the text, or None if the corpus has no such id
    readout        where features are read: `before` the blank, at the blank (`mask`), or at the `last` token; with the first two the blank
                   ends the window, with `last` up to a quarter of the window follows it
    word_min_count, word_max_count
                   the band: how often a word occurs in the pool, in any spelling. Below it there are hardly enough windows; above it stand
                   function words, which so fill their documents that few windows hold them just once
    seed           int, or tuple of ints

    Raises ValueError, one line that says which setting to change, if the pool cannot give what is asked for.
    """

    def __init__(self, tokens, token_bytes, *, eot, mask, n_way=16, k_shot=4, q_query=4, episode_len=64, readout="before",
                 word_min_count=20, word_max_count=5000, seed=0):
        least = {"n_way": (n_way, 2), "k_shot": (k_shot, 1), "q_query": (q_query, 1), "episode_len": (episode_len, MIN_WINDOW)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name}={value} must be at least {minimum}")
        if readout not in ("before", "mask", "last"):
            raise ValueError(f"readout={readout!r} must be before, mask or last")
        if mask is None:
            raise ValueError("the corpus has no <|mask|> token for the blanks; prepare it again with data/prepare.py, or change dataset")
        if (tokens == mask).any():
            raise ValueError(f"the text of the corpus contains the blank, <|mask|> = {mask}; prepare it again with data/prepare.py")
        self.tokens, self.eot, self.mask, self.seed = tokens, eot, mask, seed
        self.n_way, self.k_shot, self.q_query, self.episode_len, self.readout = n_way, k_shot, q_query, episode_len, readout
        self.word_min_count, self.word_max_count = word_min_count, word_max_count
        self._index_windows(*self._index_words(token_bytes))
        self._check_enough_words(heldout=False)

    # -------------------------------------------------------------------------
    # the index: where in the pool each word is, and from where to where its windows reach

    def _index_words(self, token_bytes):
        """
        Finds the words that are tokens with their leading space, here called forms, in whatever spelling. Returns
        starts (c,)    where the text may be cut without cutting a word, nearly everywhere; the last entry is n
        place (m,)     start of a chunk, that is the tokens from one start to the next, in which a form occurs
        form (m,)      which form
        whole (m,)     whether the chunk is just " word" and so can be blanked
        """
        tokens, texts = self.tokens, [piece.decode("utf-8", "surrogateescape") for piece in token_bytes]
        words = [words_of(text) for text in texts]

        # What each token id says about words.
        size = 1 + max(len(texts), self.eot, self.mask, int(tokens.max(initial=0)))
        begins, ends, is_word, several = np.zeros((4, size), bool)
        form_of = np.full(size, -1, np.int32)  # of a token that holds one word, with its leading space or not
        number, self.canonical = {}, []
        for i, text in enumerate(texts):
            # a stray byte ('\udc80' to '\udcff') may be a piece of a letter and so counts as one
            begins[i], ends[i] = (c.isalpha() or "\udc80" <= c <= "\udcff" for c in (text[:1], text[-1:]))
            is_word[i], several[i] = text[:1] == " " and text[1:].isalpha(), len(words[i]) > 1
            if is_word[i] and words[i][0] not in number:
                number[words[i][0]] = len(number)
                self.canonical.append(i)       # of several ids, " the" and " The", the lowest: the commonest in byte-pair encoding
        for i in range(len(texts)):
            if len(words[i]) == 1:
                form_of[i] = number.get(words[i][0], -1)

        # Single tokens are looked up, all at once. Chunks of several, " TH" "E" or a letter's bytes, are read, each different one once.
        crossed = ends[tokens[:-1]] & begins[tokens[1:]]  # (n-1,) a word goes on from a token to the next
        starts = np.concatenate([[0], np.flatnonzero(~crossed) + 1, [len(tokens)]])
        first = tokens[starts[:-1]]
        single = (np.diff(starts) == 1) & ~several[first]
        looked_up = np.flatnonzero(single & (form_of[first] >= 0))
        raw, width, known, place, form = tokens.tobytes(), tokens.itemsize, {}, [], []
        for start, end in zip(starts[:-1][~single].tolist(), starts[1:][~single].tolist(), strict=True):
            chunk = raw[start * width : end * width]
            if chunk not in known:
                text = b"".join(token_bytes[i] for i in np.frombuffer(chunk, tokens.dtype)).decode("utf-8", "replace")
                known[chunk] = [number[word] for word in words_of(text) if word in number]
            for found in known[chunk]:
                place.append(start)
                form.append(found)
        place = np.concatenate([starts[looked_up], np.array(place, np.int64)])
        form = np.concatenate([form_of[first[looked_up]], np.array(form, np.int64)])
        whole = np.concatenate([is_word[first[looked_up]], np.zeros(len(place) - len(looked_up), bool)])
        self.canonical = np.array(self.canonical, np.int64)
        self.heldout = np.array([is_heldout(word) for word in number], bool)
        return starts, place, form, whole

    def _index_windows(self, starts, place, form, whole):
        """
        Gives every place that can be blanked its window, tokens lo to hi, exclusive, and sorts the windows into groups, of which an episode
        uses each at most once: the windows of a word in one document or, for a word in too few documents, in one cell of a document.
        """
        tokens, n, L, windows_per_word = self.tokens, len(self.tokens), self.episode_len, self.k_shot + self.q_query
        is_eot, is_start = tokens == self.eot, np.zeros(n + 1, bool)
        is_start[starts] = True
        rank = np.cumsum(is_start)                              # starts[rank[i] - 1] is the last start up to i
        doc_end = np.append(np.flatnonzero(is_eot), n)          # (documents + 1,) where the end-of-text id stands
        doc_start = np.append(0, doc_end[:-1] + 1)
        longest = (doc_end - doc_start).max()
        if longest < L:
            raise ValueError(f"episode_len={L} is longer than the longest document, which has {longest} tokens; lower episode_len")

        # Places of words within the band, by word and position.
        count = np.bincount(form, minlength=len(self.canonical))
        keep = ((self.word_min_count <= count) & (count <= self.word_max_count))[form]
        self.places = form[keep] * n + place[keep]              # every place of every word, kept for the asserts
        order = np.argsort(self.places)
        self.places, place, form, whole = self.places[order], place[keep][order], form[keep][order], whole[keep][order]
        doc = (np.cumsum(is_eot) - is_eot)[place]

        # A window reaches as far as episode_len and its document allow, but not to the word's neighbouring places, and cuts no word.
        new_form = changes(form)
        previous = np.where(new_form, -1, np.roll(place, 1))
        following = np.where(np.roll(new_form, -1), n, np.roll(place, -1))
        after = L // 4 if self.readout == "last" else 0
        lo = np.maximum.reduce([place - (L - 1 - after), doc_start[doc], previous + 1])
        lo = starts[rank[lo] - is_start[lo]]                    # the first start from lo on
        after = np.minimum(after, (place - lo + 1) // 3)        # a quarter of the window, also if the window is short
        hi = np.minimum.reduce([place + 1 + after, doc_end[doc], following])
        hi = starts[rank[hi] - 1]
        usable = np.flatnonzero(whole & (hi - lo >= MIN_WINDOW) & (2 * (hi - place - 1) >= after))
        self.place, self.lo, self.hi, self.doc, form = place[usable], lo[usable], hi[usable], doc[usable], form[usable]

        # Groups. Windows in every other cell of FAR + L tokens are at least FAR apart.
        documents = np.bincount(form[changes(form, self.doc)], minlength=len(count))
        cell = np.where((documents < windows_per_word)[form], (self.place - doc_start[self.doc]) // (FAR + L), 0)
        even = np.flatnonzero(cell % 2 == 0)
        self.place, self.lo, self.hi, self.doc, form = self.place[even], self.lo[even], self.hi[even], self.doc[even], form[even]
        new_group = changes(form, self.doc, cell[even])
        self.group_start = np.flatnonzero(new_group)            # (groups,) into self.place
        self.group_size = np.diff(self.group_start, append=len(form))
        self.n_groups = np.bincount(form[new_group], minlength=len(count))
        self.first_group = np.cumsum(self.n_groups) - self.n_groups
        enough = self.n_groups >= windows_per_word
        self.words = {False: np.flatnonzero(enough & ~self.heldout), True: np.flatnonzero(enough & self.heldout)}

    def _check_enough_words(self, heldout):
        have, kind = len(self.words[heldout]), "held-out" if heldout else "training"
        if have < self.n_way:
            raise ValueError(f"n_way={self.n_way}, but only {have} {kind} words with {self.word_min_count} to {self.word_max_count} "
                             f"occurrences have {self.k_shot} + {self.q_query} windows far enough apart; lower n_way, k_shot, q_query or "
                             "word_min_count, raise word_max_count or pool_tokens, or take a larger corpus")

    # -------------------------------------------------------------------------
    # episodes

    def episode(self, index, heldout=False):
        """
        The task of this index, an int or a tuple of ints such as (step, number): the same at every call, whatever was asked for before.
        Words are equally likely, and so are the documents of a word, so that neither frequent words nor long documents prevail.
        """
        self._check_enough_words(heldout)
        N, K, Q = self.n_way, self.k_shot, self.q_query
        rng = generator(self.seed, index, int(heldout))
        form = rng.choice(self.words[heldout], N, replace=False)        # in random order: position is label
        group = self.first_group[form, None] + distinct(rng, self.n_groups[form], K + Q)        # (N, K+Q)
        window = self.group_start[group] + rng.integers(self.group_size[group])                 # (N, K+Q)
        doc, lo, hi = self.doc[window], self.lo[window], self.hi[window]
        other_doc = doc[:, :K, None] != doc[:, None, K:]                # (N, K, Q) support against query
        apart = np.maximum(lo[:, :K, None] - hi[:, None, K:], lo[:, None, K:] - hi[:, :K, None])
        assert (other_doc | (apart >= FAR)).all(), f"episode {index}: support and query {apart[~other_doc].min()} tokens apart"
        support, support_pos = self._cut(window[:, :K], form)
        query, query_pos = self._cut(window[:, K:], form)
        label = np.arange(N)
        return Episode(support, label.repeat(K), support_pos, query, label.repeat(Q), query_pos,
                       words=self.canonical[form], far_share=float(other_doc.all((1, 2)).mean()))

    def _cut(self, window, form):
        """The windows (N, k) of the words `form` (N,), blanked and padded: tokens (N*k, L), and where they are read (N*k,)."""
        lo, hi, place = self.lo[window].ravel(), self.hi[window].ravel(), self.place[window].ravel()
        at = lo[:, None] + np.arange(self.episode_len)                  # (N*k, L)
        inside = at < hi[:, None]
        rows = np.where(inside, self.tokens[np.minimum(at, len(self.tokens) - 1)], self.eot).astype(np.int64)
        rows[np.arange(len(rows)), place - lo] = self.mask
        times = np.diff(np.searchsorted(self.places, form.repeat(window.shape[1])[:, None] * len(self.tokens) + np.stack([lo, hi], 1)))
        assert (times == 1).all(), f"the word stands {times.ravel()} times in its windows, tokens {lo} to {hi} of the pool"
        assert ((rows == self.mask).sum(1) == 1).all(), f"blanks per window: {(rows == self.mask).sum(1)}"
        assert ((rows == self.eot) == ~inside).all(), f"end-of-text inside the windows {lo} to {hi}"
        return rows, {"before": place - lo - 1, "mask": place - lo, "last": hi - lo - 1}[self.readout]


# -----------------------------------------------------------------------------
# one task to look at

def show(episode, token_bytes, eot, mask):
    """An episode as text to print: examples with their labels, questions in another order, candidate words, answers."""

    def line(row, label):
        pieces = (b" _____" if i == mask else token_bytes[i] for i in row[row != eot].tolist())
        text = " ".join(b"".join(pieces).decode("utf-8", "replace").split())
        return textwrap.fill(text, 100, initial_indent=f"  [{label}] ... ", subsequent_indent=" " * 10)

    word = [token_bytes[i].decode().strip().casefold() for i in episode.words.tolist()]
    question = np.random.default_rng(0).permutation(len(episode.query))
    letter = [chr(ord("a") + i) for i in range(len(question))]
    answers = zip(letter, episode.query_labels[question].tolist(), strict=True)
    return "\n".join([
        "EXAMPLES: the same number hides the same word (support; the inner loop learns from these)\n",
        *map(line, episode.support, episode.support_labels),
        "\nQUESTIONS: which number belongs here? (query; the outer loop is graded on these)\n",
        *map(line, episode.query[question], letter),
        "\nCANDIDATES, of which the model sees only the numbers: " + ", ".join(f"{c} = {w}" for c, w in enumerate(word)),
        "ANSWERS: " + ", ".join(f"{a} = {c} ({word[c]})" for a, c in answers),
    ])


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from runs import fail, load_corpus

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "data" / "docstrings"
    corpus = load_corpus(folder)
    try:
        text = pool(corpus.train, 2_000_000, seed=0, refresh=0, eot=corpus.eot)
        sampler = Sampler(text, corpus.token_bytes, eot=corpus.eot, mask=corpus.mask, n_way=4, k_shot=2, q_query=1, episode_len=32)
    except ValueError as error:
        fail(f"{folder}: {error}")
    print(f"One task from {folder}: {sampler.n_way} words, {sampler.k_shot} examples and {sampler.q_query} question each.\n")
    print(show(sampler.episode(0), corpus.token_bytes, corpus.eot, corpus.mask))
