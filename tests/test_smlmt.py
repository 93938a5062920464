"""Episodes against the text itself. The oracles here know nothing of the index. They decode windows,
search words with a regular expression, and find each window in the pool by the tokens before its mask.
"""
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import ROOT, run_many

import smlmt
from plumbing.corpus import load_corpus
from smlmt import FAR, Pools, Sampler, draw_distinct, is_heldout, pool, show, words_of

RUN = re.compile(r"[^\W\d_]+")  # a run of letters
EOT, MASK = 998, 999

@pytest.fixture(scope="module")
def text(data_dir):
    """The tokens of a corpus, a document per module of the standard library: (tokens, token_bytes)."""
    corpus = load_corpus(data_dir / "docstrings")
    assert (corpus.eot, corpus.mask) == (EOT, MASK)
    return np.concatenate([corpus.train, corpus.val]), corpus.token_bytes

def make(text, **settings):
    tokens, token_bytes = text
    settings = {"n_way": 4, "k_shot": 2, "q_query": 2, "seed": 7} | settings
    return Sampler(tokens, token_bytes, eot=EOT, mask=MASK, **settings)

def parts(episode):
    yield episode.support, episode.support_labels, episode.support_pos
    yield episode.query, episode.query_labels, episode.query_pos

def decode(token_bytes, ids):
    return b"".join(token_bytes[i] for i in ids.tolist()).decode("utf-8")  # strict: no window cuts a letter

def word(token_bytes, i):
    return token_bytes[i].decode().removeprefix(" ").casefold()

class Places:
    """Where windows come from: `find` gives the only place in the pool, or None where the text repeats."""

    def __init__(self, text, context=11):
        self.tokens, self.token_bytes, self.context, self.at = *text, context, defaultdict(list)
        raw = self.tokens.tobytes()
        for p in range(context, len(self.tokens)):
            self.at[raw[2 * (p - context) : 2 * p]].append(p)
        self.doc = np.cumsum(self.tokens == EOT)

    def find(self, row, masked, end, form):
        before, after = row[:masked].astype(np.uint16), row[masked + 1 : end].astype(np.uint16)
        places = [p for p in self.at[before[-self.context :].tobytes()]
                  if p >= masked and (self.tokens[p - masked : p] == before).all()
                  and (self.tokens[p + 1 : p + end - masked] == after).all()
                  and word(self.token_bytes, self.tokens[p]) == form]
        assert places, f"no place in the pool has the {form!r} window {row}"
        return places[0] if len(places) == 1 else None

# --------------------------------------------------------------------------------------------------
# Windows

@pytest.mark.parametrize("readout", ["before", "mask", "last"])
def test_windows_hold_their_word_once_and_show_it_nowhere(text, readout):
    sampler, token_bytes, share, lengths = make(text, readout=readout, episode_len=48), text[1], [], []
    for index in range(400):
        episode = sampler.episode(index, heldout=index % 4 == 0)
        assert len(set(episode.words.tolist())) == 4
        for rows, labels, pos in parts(episode):
            assert rows.shape == (8, 48) and rows.dtype == labels.dtype == pos.dtype == np.int64
            assert np.bincount(labels).tolist() == [2] * 4  # a constant answer scores 1/N
            for row, label, at in zip(rows, labels, pos, strict=True):
                [masked] = np.flatnonzero(row == MASK)
                end = np.append(np.flatnonzero(row == EOT), 48)[0]
                assert (row[end:] == EOT).all() and end >= 16
                assert at == {"before": masked - 1, "mask": masked, "last": end - 1}[readout]
                assert readout == "last" or end == masked + 1
                shown = decode(token_bytes, row[:masked]) + "_" + decode(token_bytes, row[masked + 1 : end])
                assert word(token_bytes, episode.words[label]) not in RUN.findall(shown.casefold())
                share.append((end - masked - 1) / end)
                lengths.append(end)
    assert max(lengths) == 48 and np.mean(lengths) > 36  # windows are cut short where they must be only
    if readout == "last":
        assert max(share) <= 0.25 and min(share) >= 0.1 and np.mean(share) > 0.2

@pytest.mark.parametrize("readout", ["before", "last"])
def test_windows_come_from_the_text_support_and_query_from_different_documents(text, readout):
    tokens, token_bytes = text
    begins = [bool(RUN.match(b.decode("utf-8", "replace"))) for b in token_bytes] + [False]  # EOT
    sampler, places, unique = make(text, readout=readout), Places(text), 0
    for index in range(300):
        episode = sampler.episode((1, index))
        docs = [defaultdict(set), defaultdict(set)]
        for (rows, labels, _), seen in zip(parts(episode), docs, strict=True):
            for row, label in zip(rows, labels.tolist(), strict=True):
                [masked], end = np.flatnonzero(row == MASK), np.append(np.flatnonzero(row == EOT), 64)[0]
                p = places.find(row, masked, end, word(token_bytes, episode.words[label]))
                if p is not None:
                    unique += 1
                    seen[label].add(int(places.doc[p]))
                    assert token_bytes[tokens[p]].startswith(b" ") and not begins[tokens[p + 1]]
        if episode.far_share == 1:
            assert all(docs[0][c].isdisjoint(docs[1][c]) for c in range(4))
    assert unique > 0.9 * 300 * 16, "the text repeats itself too much for this test to mean anything"

def test_words_in_few_documents_have_windows_far_apart(text):
    tokens, token_bytes = text
    joined = tokens.copy()
    ends = np.flatnonzero(joined == EOT)
    inner = np.arange(len(ends)) % (len(ends) // 3) != 0
    joined[ends[inner][:-1]] = token_bytes.index(b".")  # three documents
    sampler, places, far, least = make((joined, token_bytes)), Places((joined, token_bytes)), [], []
    for index in range(300):
        episode = sampler.episode(index)
        windows = [defaultdict(list), defaultdict(list)]
        for (rows, labels, _), seen in zip(parts(episode), windows, strict=True):
            for row, label in zip(rows, labels.tolist(), strict=True):
                [masked] = np.flatnonzero(row == MASK)
                p = places.find(row, masked, masked + 1, word(token_bytes, episode.words[label]))
                seen[label].append((p, masked))
        same = np.zeros(4)
        for label in range(4):
            for p, before_p in windows[0][label]:
                for q, before_q in windows[1][label]:
                    if p is not None and q is not None and places.doc[p] == places.doc[q]:
                        same[label] = 1
                        least.append(p - before_p - q - 1 if q < p else q - before_q - p - 1)
        if all(p is not None for seen in windows for of_word in seen.values() for p, _ in of_word):
            far.append(episode.far_share)
            assert episode.far_share == 1 - same.mean()
    assert len(far) > 100 and 0.1 < np.mean(far) < 0.9
    assert FAR <= min(least) < 2 * FAR

def spelled(*documents):
    """Bytes as tokens, but for these words and pieces: the pool, the tokens, and the tokens' bytes."""
    pieces = [" field", " Field", "Field", " FIE", " caf\xe9", " river", " grain", " .", " ;", " a-field"]
    token_bytes = [bytes([i]) for i in range(256)] + [p.encode() for p in pieces]
    longest_first = sorted(map(re.escape, token_bytes[256:]), key=len, reverse=True)
    pattern = re.compile(b"|".join([*longest_first, b"."]), re.DOTALL)
    number = {piece: i for i, piece in enumerate(token_bytes)}
    ids = [[*(number[m] for m in pattern.findall(d.encode())), 1000] for d in documents]
    return np.array(sum(ids, []), np.uint16), token_bytes

TWO_WORDS = dict(eot=1000, mask=1001, n_way=2, k_shot=1, q_query=1, word_min_count=1, episode_len=32)

def test_every_spelling_counts():
    fill = " ." * 20
    hides = ["(Field)", "FIELD,", " FIELD", "\nfield", " a_field_b", "9field", "\u201cfield\u201d",
             " \u0130-field", " a-field"]  # the last is one token of two words
    harmless = [" fields", " Fieldwork", "midfield", " FIEL", " f ield"]
    for near, masked in [(h, 0) for h in hides] + [(h, 1) for h in harmless]:
        documents = [fill + near + " ." * 4 + " field" + fill + " river" + fill] * 4
        tokens, token_bytes = spelled(*documents)
        if masked:
            drawn = [Sampler(tokens, token_bytes, **TWO_WORDS).episode(i) for i in range(4)]
            assert all(set(e.words.tolist()) == {256, 261} for e in drawn), near
        else:
            with pytest.raises(ValueError, match="only 1 training words"):
                Sampler(tokens, token_bytes, **TWO_WORDS).episode(0)

def test_spellings_of_a_word_are_one_word():
    fill = " ." * 20
    documents = [fill + field + fill + " river" + fill for field in (" field", " Field")]
    sampler = Sampler(*spelled(*documents), **TWO_WORDS | {"word_min_count": 2})
    assert {tuple(sorted(sampler.episode(i).words.tolist())) for i in range(9)} == {(256, 261)}

def test_letters_cut_into_bytes():
    """A word that goes on in a following piece of a letter is not that word; one hidden in bytes is seen."""
    fill = " ." * 20
    words = fill + " caf\xe9" + fill + " grain" + fill
    assert len(Sampler(*spelled(*[words] * 3), **TWO_WORDS).episode(0).words) == 2
    for old, new in [(" grain", " grain\xe9"), (" grain", " GRAIN . grain"),
                     (" caf\xe9", " CAF\xc9"), (" caf\xe9", "\u2009CAF\xc9 . caf\xe9")]:
        broken = words.replace(old, new)
        with pytest.raises(ValueError, match="only 1 training words"):
            Sampler(*spelled(*[broken] * 3), **TWO_WORDS).episode(0)
    words = "the np array s i\u0307 strasse x".split()
    assert words_of("The np.array's \u0130 STRA\xdfE x2") == words

def test_worked_example(monkeypatch):
    """What the docstring of smlmt.py says of six words, here twice, in windows of two tokens and more."""
    monkeypatch.setattr(smlmt, "MIN_WINDOW", 2)
    token_bytes = b"The| potter| fires| clay|.| Clay| hard|ens".split(b"|")
    tokens = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 7, 4, 8], np.uint16), 2)
    sampler = Sampler(tokens, token_bytes, **TWO_WORDS | {"eot": 8, "mask": 9, "episode_len": 4})
    vocabulary = smlmt.Vocabulary(token_bytes, 10)
    assert list(vocabulary.number) == ["potter", "fires", "clay", "hard"]
    starts, place, form, whole = sampler._index_words(vocabulary, token_bytes)
    assert starts.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20]
    assert np.bincount(form).tolist() == [2, 2, 4] and whole.all()  # no word hard in hardens
    of_clay = sampler.windows[np.isin(tokens[sampler.windows.place], (3, 5))]
    shown = [decode(token_bytes, tokens[window.lo : window.hi]) for window in of_clay[:2]]
    assert shown == ["The potter fires clay", ". Clay"]
    assert sampler.n_groups.tolist() == [2, 2, 2, 0] and sampler.group_size.tolist() == [1, 1, 1, 1, 2, 2]

# --------------------------------------------------------------------------------------------------
# Words

def test_frequency_range_counts_every_spelling(text):
    tokens, token_bytes = text
    documents = np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1]
    count = Counter(w for d in documents for w in RUN.findall(decode(token_bytes, d[:-1]).casefold()))
    sampler, drawn = make(text, word_min_count=50, word_max_count=200, n_way=32), set()
    for index in range(300):
        drawn |= set(sampler.episode(index).words.tolist())
    counts = {i: count[word(token_bytes, i)] for i in drawn}
    assert 50 <= min(counts.values()) < 55 and 190 < max(counts.values()) <= 200
    # nearly all words of the range are there; what is missing is in too few documents
    pieces = [piece.decode("utf-8", "replace") for piece in token_bytes]
    candidates = {piece[1:].casefold() for piece in pieces if re.fullmatch(r" [^\W\d_]+", piece)}
    expected = {w for w in candidates if 50 <= count[w] <= 200 and not is_heldout(w)}
    assert {word(token_bytes, i) for i in drawn} <= expected and len(drawn) > 0.9 * len(expected)

def test_a_tenth_of_the_words_is_held_out_whatever_the_seed_and_corpus(text):
    half = text[0][: int(np.flatnonzero(text[0] == EOT)[120]) + 1], text[1]
    words = {heldout: set() for heldout in (False, True)}
    for sampler in (make(text, n_way=16, seed=1), make(text, n_way=16, seed=(2, 3)), make(half, n_way=8)):
        for index in range(100):
            for heldout in (False, True):
                words[heldout] |= {word(text[1], i) for i in sampler.episode(index, heldout).words}
    assert words[False].isdisjoint(words[True]) and len(words[True]) > 20 and len(words[False]) > 120
    assert list(filter(is_heldout, "the are of it file list a".split())) == ["are", "it", "list"]
    consonants = "bcdfghklmnprstvwxz"
    made_up = [a + b + c for a in consonants for b in "aeiouy" for c in consonants]
    assert 0.09 < np.mean([is_heldout(w) for w in made_up]) < 0.11

def test_labels_are_permuted_and_words_equally_likely(text):
    sampler, label, order = make(text, n_way=4), defaultdict(lambda: np.zeros(4)), Counter()
    drawn = [sampler.episode(index).words for index in range(1500)]
    for words in drawn:
        order[tuple(np.argsort(words).tolist())] += 1
        for c, w in enumerate(words.tolist()):
            label[w][c] += 1
    assert len(order) == 24 and chi2(list(order.values())) < 3  # all 4! orders, alike
    assert np.mean([chi2(n) for n in label.values()]) < 1.3  # a word has every label
    assert chi2([n.sum() for n in label.values()]) < 1.5 and len(label) > 120  # and every word its share

def chi2(counts):
    """Pearson's statistic over its degrees of freedom, about 1 if all counts have the same expectation."""
    counts = np.array(counts)
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum() / (len(counts) - 1)

def test_distinct_draws_every_ordered_choice_alike():
    rng = np.random.default_rng(0)
    drawn = draw_distinct(rng, np.repeat([4, 3], 12000), 3)
    for n, rows, choices in ((4, drawn[:12000], 24), (3, drawn[12000:], 6)):
        seen = Counter(map(tuple, rows.tolist()))
        assert len(seen) == choices and chi2(list(seen.values())) < 2
        assert all(len(set(c)) == 3 and max(c) < n for c in seen)

def test_documents_of_a_word_are_equally_likely_and_so_are_its_places_in_them():
    short = (" ;" * 40).join(["", " field", " grain", ""])
    dots = " ." * 40
    long = "".join(dots + chr(65 + i) + " ." * 20 + " field" + dots + " grain" for i in range(30)) + " ."
    tokens, token_bytes = spelled(long, *[short] * 5)
    sampler = Sampler(tokens, token_bytes, **TWO_WORDS | {"episode_len": 64})
    rows = np.concatenate([sampler.episode(i).query for i in range(1500)])
    from_long = rows[rows[:, 0] == tokens[0]]
    assert abs(len(from_long) / len(rows) - 1 / 6) < 0.03  # one of six, although it has each word 30 times
    assert len(np.unique(from_long, axis=0)) == 60  # and gives all of them

# --------------------------------------------------------------------------------------------------
# Randomness

def equal(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)

def test_an_episode_depends_on_seed_and_index_alone(text):
    first, second = make(text), make((text[0].copy(), text[1]))
    forwards = [first.episode((5, e)) for e in range(20)]
    backwards = []
    for e in reversed(range(20)):
        backwards.append(second.episode((5, e)))
        second.episode(e, heldout=True)  # evaluating in between disturbs nothing
    assert all(equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    others = [first.episode(index) for index in ((5, 1), (6, 0), 5, (5, 0, 0))]
    others.append(first.episode((5, 0), heldout=True))
    for seed, index in ((8, (5, 0)), ((7, 0), (5, 0)), ((7, 5), 0)):
        others.append(make(text, seed=seed).episode(index))
    assert not any(equal(a, b) for i, a in enumerate(others) for b in [forwards[0], *others[:i]])
    assert equal(first.episode(np.int64(3)), first.episode(3))
    first.words[True] = first.words[False]  # not only the words are others, the random numbers too
    assert not equal(first.episode(3), first.episode(3, heldout=True))

def test_pool_is_whole_documents_and_depends_on_seed_and_refresh(text, tmp_path):
    tokens = text[0]
    tokens.tofile(tmp_path / "train.bin")
    corpus = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    whole = pool(corpus, len(tokens), 0, 0, eot=EOT)
    assert np.array_equal(whole, tokens) and not isinstance(whole, np.memmap)
    documents = {d.tobytes() for d in np.split(tokens, np.flatnonzero(tokens == EOT) + 1)}
    pieces = [pool(corpus, len(tokens) // 3, 0, refresh, eot=EOT) for refresh in range(30)]
    for piece in pieces:
        assert piece[-1] == EOT and len(piece) < len(tokens)
        whole = [d.tobytes() for d in np.split(piece, np.flatnonzero(piece == EOT) + 1)[:-1]]
        assert set(whole) <= documents and len(set(whole)) == len(whole)
    assert abs(np.mean([len(p) for p in pieces]) / (len(tokens) // 3) - 1) < 0.1
    reached = {d.tobytes() for p in pieces for d in np.split(p, np.flatnonzero(p == EOT) + 1)}
    assert reached == documents  # nothing is out of reach
    assert np.array_equal(pieces[4], pool(tokens, len(tokens) // 3, 0, 4, eot=EOT))
    for other in (pieces[5], pool(tokens, len(tokens) // 3, 1, 4, eot=EOT)):
        assert not np.array_equal(pieces[4], other)

def test_pools_change_every_thousand_steps_if_the_text_is_larger(text):
    options = dict(eot=EOT, mask=MASK, n_way=4, k_shot=2, q_query=2, seed=(3, 2))
    pools = Pools(*text, pool_tokens=len(text[0]) // 2, pool_seed=(3, 3), **options)
    for step, number in ((1, 0), (2500, 2), (999, 0), (2999, 2)):
        by_hand = Sampler(pool(text[0], len(text[0]) // 2, (3, 3), number, eot=EOT), text[1], **options)
        assert equal(pools.sampler(step).episode((step, 1)), by_hand.episode((step, 1)))
    assert pools.sampler(2000) is pools.sampler(2999)
    fits = Pools(*text, pool_tokens=len(text[0]), pool_seed=(3, 3), **options)
    assert fits.sampler(1) is fits.sampler(5000) and np.array_equal(fits.sampler(1).tokens, text[0])
    assert fits.problem() == fits.problem(heldout=True) == ""
    many = Pools(*text, pool_tokens=len(text[0]), pool_seed=0, **options | {"n_way": 100})
    assert many.problem() == "" and "held-out words" in many.problem(heldout=True)

# --------------------------------------------------------------------------------------------------
# Errors, the printed task

@pytest.mark.parametrize("settings, message", [
    (dict(n_way=5000), "n_way=5000, but only .* lower n_way"),
    (dict(word_min_count=10**6), "only 0 training words .* lower .* word_min_count"),
    (dict(word_max_count=1), "raise word_max_count"), (dict(k_shot=300), "lower n_way, k_shot"),
    (dict(episode_len=10**6), "episode_len=1000000 is longer than the longest .* lower episode_len"),
])
def test_impossible_settings_are_one_line_that_names_the_setting(text, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make(text, **settings).episode(0)
    assert "\n" not in str(error.value)

def test_impossible_corpora_are_one_line(text):
    tokens, token_bytes = text
    with pytest.raises(ValueError, match=r"no <\|mask\|> token"):
        Sampler(tokens, token_bytes, eot=EOT, mask=None)
    with pytest.raises(ValueError, match=r"contains <\|mask\|>"):
        Sampler(np.append(tokens, np.uint16(MASK)), token_bytes, eot=EOT, mask=MASK)
    with pytest.raises(ValueError, match=r"held-out words .* lower n_way"):
        make(text, n_way=100).episode(0, heldout=True)
    with pytest.raises(ValueError, match="pool_tokens=64: no document"):
        pool(np.zeros(10**6, np.uint16), 64, 3, 0, eot=EOT)

def test_a_task_prints_as_sentences(text):
    episode = make(text, n_way=3, k_shot=2, q_query=1, episode_len=24).episode(0)
    printed = show(episode, text[1], EOT, MASK)
    assert printed.count("_____") == 9 and max(map(len, printed.splitlines())) <= 140
    for c, i in enumerate(episode.words):
        assert f"{c} = {word(text[1], i)}" in printed
    examples = printed[printed.index("EXAMPLES") : printed.index("QUESTIONS")]
    assert [examples.count(f"[{c}]") for c in range(3)] == [2, 2, 2]

def test_script_prints_a_task_of_the_corpus_or_one_line(data_dir, tmp_path):
    done, nothing = run_many("smlmt.py", [[data_dir / "docstrings"], [tmp_path / "nowhere"]])
    assert done.returncode == 0 and done.stderr == "", done
    assert done.stdout.count("_____") == 12 and "ANSWERS: a = " in done.stdout, done
    assert nothing.returncode == 2 and nothing.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", nothing.stderr)

@pytest.mark.parametrize("unbuffered", ["", "1"])  # it is noticed while printing, or at the very end
def test_a_reader_that_went_away_is_no_mistake(data_dir, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, ROOT / "smlmt.py", data_dir / "docstrings"], os.environ
    done = subprocess.run(command, env=environment | {"PYTHONUNBUFFERED": unbuffered}, stdout=writer,
                          stderr=subprocess.PIPE, timeout=100)
    os.close(writer)
    assert done.stderr == b""
