"""Few-shot tasks cut from plain text: subset masked language modelling tasks, SMLMT (Bansal et al. 2020,
EMNLP, 2020.emnlp-main.38).

Choose N words. For each, find K + Q places in the text where it occurs, and mask it there. K of these
windows, the support, are shown with the answer; the other Q, the query, ask for it. The answer is not the
word but a label 0..N-1, shuffled anew in every task (episode). So there is nothing to remember from one task
to the next. What can be learnt over many of them is how to learn a word from K examples.

What a Sampler makes of a text of six words (limits on length and frequency aside):

    tokens    The| potter| fires| clay|.| Clay| hard|ens|.
    chunks    The| potter| fires| clay|.| Clay| hardens|.    a cut between chunks cuts no word
    forms     potter, fires, clay    words that are one token, with its leading space: only these are masked
    windows   The potter fires _____    and    . _____    of clay. Each holds its word once, in upper or
              lower case: so the second begins after the first clay
    groups    both windows are one group, because they stand in one document: an episode uses one at most

Departures from the paper: a window holds its word once, and so has one mask; support and query windows of a
word come from different documents, or failing that stand FAR tokens apart; a tenth of all words is never
asked about in training; an episode is a pure function of (text, seed, index): runs can be resumed, compared.

    python smlmt.py [corpus folder]    prints one small task
"""
import string
import textwrap
import zlib
from dataclasses import dataclass

import numpy as np

MIN_WINDOW = 16    # tokens, the mask among them: with fewer there is too little to go by
FAR = 2048         # least number of tokens between two windows of a word that occurs in too few documents
STRETCHES = 64     # a pool is made of this many stretches of the corpus
POOL_STEPS = 1000  # steps between two pools, where the corpus is larger than one

@dataclass(frozen=True)
class Episode:
    """One task of N words, K support and Q query windows each. Rows of the same label are adjacent."""
    support: np.ndarray         # (N*K, L) token ids: text, <|mask|> for the word, end-of-text as padding
    support_labels: np.ndarray  # (N*K,) 0..N-1
    support_pos: np.ndarray     # (N*K,) the column where the features are read
    query: np.ndarray           # (N*Q, L)
    query_labels: np.ndarray    # (N*Q,)
    query_pos: np.ndarray       # (N*Q,)
    words: np.ndarray           # (N,) label c stands for the word of token id words[c]
    far_share: float            # share of the words whose support and query have no document in common

def words_of(text):
    """The runs of letters in a text, casefolded: "The np.array's" has the, np, array and s."""
    return [word.casefold() for word in "".join(c if c.isalpha() else " " for c in text).split()]

def is_heldout(word):
    """Whether a word is in the tenth that training never asks about: the same for all corpora and seeds."""
    return zlib.crc32(word.encode()) % 10 == 0

def make_rng(seed, *index):
    """A random number generator that depends on (seed, *index) alone, ints or tuples of ints."""
    numbers = []
    for part in (seed, *index):
        part = part if isinstance(part, tuple) else (part,)
        numbers += [len(part), *map(int, part)]  # the length too: to NumPy (1,) and (1, 0) are the same seed
    return np.random.default_rng(numbers)

def draw_distinct(rng, sizes, k):
    """k different integers below each of `sizes` (n,), in random order: (n, k). Floyd, CACM 30(9), 1987."""
    chosen = np.empty((len(sizes), k), np.int64)
    for i in range(k):
        last = sizes - k + i
        guess = rng.integers(last + 1)
        taken = (chosen[:, :i] == guess[:, None]).any(1)
        chosen[:, i] = np.where(taken, last, guess)
    return rng.permuted(chosen, axis=1)

def is_new_run(*columns):
    """(n,) bool: where a row differs from the one before it in any of the columns (n,), integers >= 0."""
    return np.any([np.diff(column, prepend=-1) != 0 for column in columns], axis=0)

# --------------------------------------------------------------------------------------------------
# The sampler

class Vocabulary:
    """Tables by token id, `size` entries each: which begin or end with a letter, and which are forms.

    A form is a casefolded word that is one token with its leading space. Forms are numbered from 0.
    """

    def __init__(self, token_bytes, size):
        texts = [piece.decode("utf-8", "surrogateescape") for piece in token_bytes]
        texts += [""] * (size - len(texts))
        words = [words_of(text) for text in texts]

        def is_letter(c):  # a stray byte may be a piece of a letter and so counts as one
            return c.isalpha() or "\udc80" <= c <= "\udcff"

        self.letter_first = np.array([is_letter(text[:1]) for text in texts])  # bool
        self.letter_last = np.array([is_letter(text[-1:]) for text in texts])
        self.has_several_words = np.array([len(of_token) > 1 for of_token in words])  # bool
        self.is_form = np.array([text[:1] == " " and text[1:].isalpha() for text in texts])  # bool: " word"
        ids = {}  # form -> its token id: of " the" and " The" the lower one, in BPE the commoner
        for i in np.flatnonzero(self.is_form).tolist():
            ids.setdefault(words[i][0], i)
        self.number = {form: c for c, form in enumerate(ids)}  # form -> its number
        # the number of a token's word, if it holds one word and that is a form; else -1
        self.form_of = np.array([self.number.get(w[0], -1) if len(w) == 1 else -1 for w in words], np.int32)
        self.ids = np.array(list(ids.values()), np.int64)  # (forms,)
        self.heldout = np.array([is_heldout(form) for form in ids], bool)  # (forms,)

class Sampler:
    """Draws episodes from a pool of text. Making one indexes the pool; an episode then is a few gathers.

    tokens       (n,) unsigned integers: the pool, its documents ended by the id `eot`
    token_bytes  the bytes of each ordinary token, by id
    mask         the id that stands for the word; None if the corpus has no such id
    readout      where features are read: `before` the mask, at the `mask`, or at the `last` token. With the
                 first two the mask ends the window, with `last` up to a quarter of the window follows it
    word_min_count, word_max_count
                 how often a word occurs in the pool, in upper or lower case. Rarer ones have too few windows.
                 Function words fill their documents so much that few windows hold them just once
    seed         int, or tuple of ints

    ValueError: the pool cannot give what is asked for. Its one line says which setting to change.
    """

    def __init__(self, tokens, token_bytes, *, eot, mask, n_way=16, k_shot=4, q_query=4, episode_len=64,
                 readout="before", word_min_count=20, word_max_count=5000, seed=0):
        if mask is None or (tokens == mask).any():
            raise ValueError("no <|mask|> token, or a text that contains <|mask|>; prepare the dataset again")
        self.tokens, self.eot, self.mask, self.seed = tokens, eot, mask, seed
        self.n_way, self.k_shot, self.q_query = n_way, k_shot, q_query
        self.episode_len, self.readout = episode_len, readout
        self.word_min_count, self.word_max_count = word_min_count, word_max_count
        # The index: where words are, from where to where their windows reach, and the groups of windows.
        vocabulary = Vocabulary(token_bytes, 1 + max(len(token_bytes), eot, mask, int(tokens.max(initial=0))))
        self.ids = vocabulary.ids
        self._index_windows(*self._index_words(vocabulary, token_bytes))
        self._index_groups(vocabulary.heldout)

    def _index_words(self, vocabulary, token_bytes):
        """Finds the forms in the text. Returns

        starts (c,)  where chunks start, and n at the end: a cut here cuts no word
        place (m,)   the start of each chunk in which a form occurs
        form (m,)    the number of the form
        whole (m,)   whether the chunk is just " word" and so can be masked
        """
        tokens, v = self.tokens, vocabulary
        joined = v.letter_last[tokens[:-1]] & v.letter_first[tokens[1:]]  # (n-1,) a word goes on in the next
        starts = np.concatenate([[0], np.flatnonzero(~joined) + 1, [len(tokens)]])

        # Nearly all chunks are one token with one word or none. These are looked up, all at once.
        first = tokens[starts[:-1]]  # (c-1,)
        single = (np.diff(starts) == 1) & ~v.has_several_words[first]
        with_form = np.flatnonzero(single & (v.form_of[first] >= 0))
        place, token = starts[with_form], first[with_form]
        form, whole = v.form_of[token], v.is_form[token]

        # The others, " TH" "E" or the bytes of a letter, are read, each different one once.
        known, place_read, form_read = {}, [], []
        for start, end in zip(starts[:-1][~single].tolist(), starts[1:][~single].tolist(), strict=True):
            chunk = tokens[start:end].tobytes()
            if chunk not in known:
                text = b"".join(token_bytes[i] for i in tokens[start:end]).decode("utf-8", "replace")
                known[chunk] = [v.number[word] for word in words_of(text) if word in v.number]
            form_read += known[chunk]
            place_read += [start] * len(known[chunk])
        place = np.concatenate([place, np.array(place_read, np.int64)])
        form = np.concatenate([form, np.array(form_read, np.int64)])
        return starts, place, form, np.append(whole, np.zeros(len(place_read), bool))

    def _index_windows(self, starts, place, form, whole):
        """Sets `windows`: form, document and its start, place of the mask, and lo, hi of the tokens lo:hi."""
        n, L = len(self.tokens), self.episode_len
        is_eot = self.tokens == self.eot
        doc_end = np.append(np.flatnonzero(is_eot), n)  # (documents + 1,) where the end-of-text id stands
        doc_start = np.append(0, doc_end[:-1] + 1)
        longest = (doc_end - doc_start).max()
        if longest < L:
            raise ValueError(f"episode_len={L} is longer than the longest document, which has {longest} "
                             "tokens; lower episode_len")

        # Places of words within the frequency range, by word and position.
        count = np.bincount(form, minlength=len(self.ids))
        keep = ((self.word_min_count <= count) & (count <= self.word_max_count))[form]
        place, form, whole = place[keep], form[keep], whole[keep]
        order = np.argsort(form * n + place)
        place, form, whole = place[order], form[order], whole[order]
        self.places = form * n + place  # every place of every word, kept for the asserts
        doc = (np.cumsum(is_eot) - is_eot)[place]

        # A window reaches as far as episode_len and its document allow, but not to the word's neighbouring
        # places. Its ends are starts of chunks, so that it cuts no word.
        new_form = is_new_run(form)
        previous = np.where(new_form, -1, np.roll(place, 1))
        following = np.where(np.roll(new_form, -1), n, np.roll(place, -1))
        most = L // 4 if self.readout == "last" else 0  # tokens after the mask
        lo = np.maximum.reduce([place - (L - 1 - most), doc_start[doc], previous + 1])
        lo = starts[np.searchsorted(starts, lo)]  # the first start from lo on
        after = np.minimum(most, (place - lo + 1) // 3)  # a third of what precedes: a quarter of the whole
        hi = np.minimum.reduce([place + 1 + after, doc_end[doc], following])
        hi = starts[np.searchsorted(starts, hi, side="right") - 1]  # the last start up to hi
        enough = (hi - lo >= MIN_WINDOW) & (2 * (hi - place - 1) >= after)  # and at least half of `after`
        columns = dict(form=form, doc=doc, doc_start=doc_start[doc], place=place, lo=lo, hi=hi)
        self.windows = np.rec.fromarrays(columns.values(), names=list(columns))[whole & enough]

    def _index_groups(self, heldout):
        """Sorts the windows into groups. An episode uses at most one window of a group.

        A group is the windows of a word in one document or, for a word in too few documents, in one cell of a
        document. Of the cells of FAR + L tokens every other is left out: windows are then at least FAR apart.
        """
        w, n_forms = self.windows, len(self.ids)
        windows_per_word = self.k_shot + self.q_query
        documents = np.bincount(w.form[is_new_run(w.form, w.doc)], minlength=n_forms)  # (forms,)
        cell = (w.place - w.doc_start) // (FAR + self.episode_len)
        cell = np.where((documents < windows_per_word)[w.form], cell, 0)
        even = cell % 2 == 0
        self.windows, cell = w[even], cell[even]
        new_group = is_new_run(self.windows.form, self.windows.doc, cell)
        self.group_start = np.flatnonzero(new_group)  # (groups,) into self.windows
        self.group_size = np.diff(self.group_start, append=len(cell))
        self.n_groups = np.bincount(self.windows.form[new_group], minlength=n_forms)  # (forms,)
        self.first_group = np.cumsum(self.n_groups) - self.n_groups
        enough = self.n_groups >= windows_per_word
        # Words that episodes can ask about: those of training (False), and those held out (True).
        self.words = {False: np.flatnonzero(enough & ~heldout), True: np.flatnonzero(enough & heldout)}

    def episode(self, index, heldout=False):
        """The task of this index, an int or a tuple of ints such as (step, number): the same at every call.

        Words are equally likely, and so are the groups of a word, and the windows of a group.
        """
        N, K, Q, words = self.n_way, self.k_shot, self.q_query, self.words[heldout]
        if len(words) < N:
            kind = "held-out" if heldout else "training"
            raise ValueError(f"n_way={N}, but only {len(words)} {kind} words have {K} + {Q} windows that are "
                             "far enough apart; lower n_way, k_shot, q_query or word_min_count, raise "
                             "word_max_count or pool_tokens")
        rng = make_rng(self.seed, index, int(heldout))
        form = rng.choice(words, N, replace=False)  # in random order: position is label
        group = self.first_group[form, None] + draw_distinct(rng, self.n_groups[form], K + Q)  # (N, K+Q)
        windows = self.windows[self.group_start[group] + rng.integers(self.group_size[group])]  # (N, K+Q)
        support, query = windows[:, :K, None], windows[:, None, K:]
        other_doc = support.doc != query.doc  # (N, K, Q)
        apart = np.maximum(support.lo - query.hi, query.lo - support.hi)
        assert (other_doc | (apart >= FAR)).all(), f"episode {index}: {apart[~other_doc].min()} tokens apart"
        label = np.arange(N)
        (support, support_pos), (query, query_pos) = self._cut(windows[:, :K]), self._cut(windows[:, K:])
        return Episode(support, label.repeat(K), support_pos, query, label.repeat(Q), query_pos,
                       words=self.ids[form], far_share=float(other_doc.all((1, 2)).mean()))

    def _cut(self, windows):
        """Windows (N, k) as masked tokens (N*k, L), and the columns where to read them (N*k,)."""
        form, place, lo, hi = (windows[name].ravel() for name in ("form", "place", "lo", "hi"))
        at = lo[:, None] + np.arange(self.episode_len)  # (N*k, L)
        inside = at < hi[:, None]
        text = self.tokens[np.minimum(at, len(self.tokens) - 1)]
        rows = np.where(inside, text, self.eot).astype(np.int64)
        rows[np.arange(len(rows)), place - lo] = self.mask
        ends = form[:, None] * len(self.tokens) + np.stack([lo, hi], 1)
        times = np.diff(np.searchsorted(self.places, ends))
        assert (times == 1).all(), f"the word occurs {times.ravel()} times in its windows, {lo} to {hi}"
        assert ((rows == self.mask).sum(1) == 1).all(), f"masks per window: {(rows == self.mask).sum(1)}"
        assert ((rows == self.eot) == ~inside).all(), f"end-of-text inside the windows {lo} to {hi}"
        return rows, {"before": place - lo - 1, "mask": place - lo, "last": hi - lo - 1}[self.readout]

# --------------------------------------------------------------------------------------------------
# Tasks inside the rows of a language-model batch

def inline(vocabulary, rows, rng, n_episodes, *, n_way, k_shot, q_query):
    """E tasks whose windows are prefixes of a batch's own rows: which of N words comes next?

    A causal model's features at a token have not seen the next one. So the tasks need no mask, and no forward
    pass of their own. They ask for training words that occur at least K + Q times in rows (B, T + 1). Returns
    how many such words there are and, if at least N, E tasks: a dict whose keys are fields of an Episode. Its
    support (E, N*K) and query (E, N*Q) are places to read: b T + t for the features of token t in row b.
    Unlike an Episode's, the windows of a word may overlap, and may have the word in them.
    """
    v, (B, width) = vocabulary, rows.shape
    form = v.form_of[rows[:, 1:-1]]  # (B, T - 1) the word that comes next, or -1
    candidate = v.is_form[rows[:, 1:-1]] & ~v.letter_first[rows[:, 2:]] & ~v.heldout[form]  # a whole word
    place = (np.arange(B)[:, None] * (width - 1) + np.arange(width - 2))[candidate]  # (m,)
    count = np.bincount(form[candidate], minlength=len(v.ids))
    first = np.cumsum(count) - count  # of each word, among the places in order of their words
    place = place[np.argsort(form[candidate], kind="stable")]
    words = np.flatnonzero(count >= k_shot + q_query)
    if len(words) < n_way:
        return len(words), None
    chosen = np.stack([rng.choice(words, n_way, replace=False) for _ in range(n_episodes)])  # (E, N)
    occurrence = draw_distinct(rng, count[chosen.ravel()], k_shot + q_query).reshape(n_episodes, n_way, -1)
    place, label = place[first[chosen][..., None] + occurrence], np.arange(n_way)  # (E, N, K + Q), (N,)
    return len(words), {
        "words": v.ids[chosen],
        "support": place[..., :k_shot].reshape(n_episodes, -1),
        "query": place[..., k_shot:].reshape(n_episodes, -1),
        "support_labels": np.tile(label.repeat(k_shot), (n_episodes, 1)),
        "query_labels": np.tile(label.repeat(q_query), (n_episodes, 1))}

# --------------------------------------------------------------------------------------------------
# A text larger than memory, a part (pool) at a time

def pool(tokens, pool_tokens, seed, refresh, *, eot):
    """The text that a Sampler works on from one refresh to the next, as an array in memory.

    All of `tokens` if these are no more than `pool_tokens`, else about that many, chosen by `seed` (int or
    tuple of ints) and `refresh` alone. The corpus is divided into equal stretches, of which STRETCHES are
    drawn. A stretch stands for the documents that start in it: they come whole, and all can be reached.
    """
    if len(tokens) <= pool_tokens:
        return np.array(tokens)

    def next_document(i, block=2**16):  # where the first document at or after token i starts
        if i == 0:
            return 0
        for before in range(i - 1, len(tokens), block):
            if len(ends := np.flatnonzero(tokens[before : before + block] == eot)):
                return before + 1 + int(ends[0])
        return len(tokens)

    size = max(1, pool_tokens // STRETCHES)
    starts = np.arange(0, len(tokens), size)
    starts = np.sort(make_rng(seed, refresh).choice(starts, STRETCHES, replace=False)).tolist()
    text = np.concatenate([tokens[next_document(i) : next_document(i + size)] for i in starts])
    if len(text) == 0:
        raise ValueError(f"pool_tokens={pool_tokens}: no document starts in what was drawn; raise it")
    return text

class Pools:
    """Samplers (with `options`) over a text of any size: one pool at a time, anew every POOL_STEPS steps."""

    def __init__(self, tokens, token_bytes, *, pool_tokens, pool_seed, eot, **options):
        self.tokens, self.token_bytes, self.eot, self.options = tokens, token_bytes, eot, options
        self.pool_tokens, self.pool_seed = pool_tokens, pool_seed
        self.number, self.latest = None, None  # of the pool in memory; its Sampler

    def sampler(self, step):
        """The Sampler of this step, made when first needed. A text that fits is one pool for all steps."""
        number = 0 if len(self.tokens) <= self.pool_tokens else step // POOL_STEPS
        if number != self.number:
            text = pool(self.tokens, self.pool_tokens, self.pool_seed, number, eot=self.eot)
            self.latest = Sampler(text, self.token_bytes, eot=self.eot, **self.options)
            self.number = number
        return self.latest

    def problem(self, heldout=False):
        """Why the first pool gives no episode (of held-out words), in one line; empty if it gives one."""
        try:
            self.sampler(0).episode(0, heldout)
        except ValueError as error:
            return str(error)
        return ""

# --------------------------------------------------------------------------------------------------
# A task to look at

def show(episode, token_bytes, eot, mask):
    """An episode as text to print: examples with their labels, questions in another order, answers."""

    def line(row, label):
        pieces = (b" _____" if i == mask else token_bytes[i] for i in row[row != eot].tolist())
        text = " ".join(b"".join(pieces).decode("utf-8", "replace").split())
        return textwrap.fill(text, 100, initial_indent=f"  [{label}] ... ", subsequent_indent=" " * 10)

    word = [token_bytes[i].decode().strip().casefold() for i in episode.words.tolist()]
    candidates = ", ".join(f"{label} = {w}" for label, w in enumerate(word))
    question = np.random.default_rng(0).permutation(len(episode.query))
    labels = dict(zip(string.ascii_letters, episode.query_labels[question].tolist(), strict=False))
    return "\n".join([
        "EXAMPLES: the same number hides the same word (support; the inner loop learns from these)\n",
        *map(line, episode.support, episode.support_labels),
        "\nQUESTIONS: which number belongs here? (query; the outer loop is graded on these)\n",
        *map(line, episode.query[question], labels),
        f"\nCANDIDATES, of which the model sees only the numbers: {candidates}",
        "ANSWERS: " + ", ".join(f"{a} = {label} ({word[label]})" for a, label in labels.items()),
    ])

def main():
    import sys

    from plumbing.corpus import load_corpus
    from plumbing.files import ROOT, attempt
    if {"-h", "--help"} & set(sys.argv):
        return print(__doc__)
    folder = sys.argv[1] if len(sys.argv) > 1 else ROOT / "data" / "docstrings"
    corpus = load_corpus(folder)
    with attempt(f"draw a task from {folder}", "take a larger corpus"):
        pools = Pools(corpus.train, corpus.token_bytes, pool_tokens=2_000_000, pool_seed=0, eot=corpus.eot,
                      mask=corpus.mask, n_way=4, k_shot=2, q_query=1, episode_len=32)
        episode = pools.sampler(0).episode(0)
    print(f"One task from {folder}: 4 words, 2 examples and 1 question each.\n")
    print(show(episode, corpus.token_bytes, corpus.eot, corpus.mask))

if __name__ == "__main__":
    main()
