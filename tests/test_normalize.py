"""The metric: what is scored, case by case, and what is counted.

A change of the tables here is another metric and needs another data.METRIC.

    OMP_NUM_THREADS=1 python -m pytest tests/test_normalize.py -q
"""

import hashlib
import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import data

ENGLISH = [
    ("", ""), ("...", ""), ("%", ""), ("Hello, World!", "hello world"), ("[um] uh hello", "hello"),
    # apostrophes and quotation marks
    ("Don’t  STOP—it’s", "do not stop it is"),
    ("don`t don´t donʼt don＇t", "do not do not do not do not"),
    ("“Well,” she said", "well she said"), ("won't gonna wanna", "will not going to want to"),
    ("y'all can't, I'll, we've, I'm, they're", "you all can not i will we have i am they are"),
    # numbers
    ("3.5%", "3.5%"), ("three point five percent", "3.5%"), ("0.5", "0.5"), ("one", "one"),
    ("twenty-three", "23"), ("nineteen ninety nine", "1999"), ("1,000,000", "1000000"),
    ("one million", "1000000"), ("three hundred and five", "305"), ("twenty first", "21st"),
    ("$20 million", "$20000000"),
    # letters
    ("Mr. Smith vs. Dr. Jones", "mister smith vs doctor jones"), ("e-mail", "e mail"),
    ("colour centre analyse", "color center analyze"), ("Café naïve", "cafe naive"),
    ("ﬁne", "fine"), ("ＡＢＣ", "abc"), ("a\u00a0b\tc\n", "a b c"), ("cause", "cause"),
    ("put 杯子 here", "put 杯 子 here"),
]

MANDARIN = [  # as written, as said: one text, without the spaces between units
    # nothing but script, width and punctuation changes
    ("", ""), ("。", ""), ("请，打开 A灯。", "请打开a灯"), ("“你好”；‘世界’！", "你好世界"),
    ("《书》、（笔）…【一】", "书笔一"), ("三 个\n瓶子", "三个瓶子"), ("it’s", "it's"), ("好\u263a\ufe0f", "好"),
    ("花儿开了啊", "花儿开了啊"), ("嗯，那个呃我在听", "嗯那个呃我在听"), ("十有八九", "十有八九"),
    ("開門，裡面請坐", "开门里面请坐"), ("ＯＫ，没问题", "ok没问题"),
    # quantities
    ("0", "零"), ("10", "十"), ("15", "十五"), ("105", "一百零五"), ("10203", "一万零二百零三"),
    ("1,234,567", "一百二十三万四千五百六十七"), ("１，０００米", "一千米"), ("卖了3.5万册", "卖了三点五万册"),
    ("气温-12度", "气温负十二度"), ("3.14", "三点一四"), ("约450人", "约四百五十人"), ("大约1/4", "大约四分之一"),
    # two, one, zero: how they are said differs, what is scored does not
    ("2个", "二个"), ("2匹马", "两匹马"), ("2朵花", "两朵花"), ("2年", "两年"), ("200元", "两百元"),
    ("二〇二三年", "二零二三年"), ("幺三八幺幺", "一三八一一"),
    # percent, fractions, ranges, signs
    ("3.5%", "百分之三点五"), ("100％", "百分之百"), ("百分之一百二十", "百分之一百二十"),
    ("20%-30%", "百分之二十到百分之三十"), ("15%～20%", "百分之十五到百分之二十"), ("1/3的人", "三分之一的人"),
    ("½", "二分之一"), ("3-5个", "三到五个"), ("20–30岁", "二十到三十岁"), ("8～10天", "八到十天"),
    ("1+1=2", "一加一等于二"), ("比分3:1", "比分三比一"),
    # dates and times
    ("2023年5月3日", "二零二三年五月三日"), ("2021-09-30", "二零二一年九月三十日"),
    ("1998–2000年", "一九九八到二零零零年"), ("9:05出发", "九点零五分出发"), ("15:00-16:00", "十五点到十六点"),
    # money and units
    ("￥9.9", "九点九元"), ("A$13", "十三澳元"), ("HKD88", "八十八港元"), ("hkd 88", "八十八港元"), ("70KG", "七十千克"),
    ("39℃", "三十九摄氏度"), ("80km/h", "每小时八十公里"),
    # digit by digit
    ("13800138000", "一三八零零一三八零零零"), ("010-67891234", "零一零六七八九一二三四"), ("拨打110", "拨打幺幺零"),
    # among letters
    ("5G网络", "五g网络"), ("A4纸", "a四纸"), ("COVID-19", "covid十九"), ("iPhone 15", "iphone十五"),
    ("B2B", "b to b"),
]

OTHERS = [
    ("Straße 7", "de", "straße 7"), ("L’été, c’est 3.5%", "fr", "l'été c'est 3.5"),
    ("‘quoted’ the boys' room", "de", "quoted the boys room"),
    ("rock 'n' roll", "de", "rock n roll"),
    ("end. 5. begin .5 U.S.A.", "de", "end 5 begin 5 u s a"), ("$1,000.50", "de", "1 000.50"),
    ("snake_case well-known", "de", "snake case well known"), ("?!…", "de", ""),
    ("Cafe\u0301", "fr", "café"), ("हिन्दी", "hi", "हिन्दी"),
    ("soft\u00adhyphen", "de", "softhyphen"),
    ("東京タワー 3.5階", "ja", "東 京 タ ワ ー 3.5 階"), ("안녕 하세요", "ko", "안 녕 하 세 요"),
    ("2個", "yue", "二 个"), ("สวัสดี hello", "th", "ส ว ั ส ด ี hello"),
    ("ສະບາຍ", None, " ".join("ສະບາຍ")), ("សួស្តី", "auto", " ".join("សួស្តី")),
    ("မင်္ဂ", "my-en", " ".join("မင်္ဂ")), ("㐀𠀀﨎ꩠ", "?", "㐀 𠀀 﨎 ꩠ"),
    ("我们有个 Meeting，OK？", "zh-en", "我 们 有 个 meeting ok"), ("Don’t买3个", "en-zh", "don't 买 三 个"),
    ("2023年", "Mandarin", "二 零 二 三 年"), ("2023年", "ZH_tw", "二 零 二 三 年"),
    ("2023年", "粤语", "二 零 二 三 年"), ("2023年", "ja", "2023 年"), ("don't", "english", "do not"),
    ("don't", "en-GB", "do not"), ("don't", "", "don't"), ("don't", None, "don't"),
    ("İzmir IŞIK", "tr", "izmir ışık"), ("I", "az-AZ", "ı"), ("ISTANBUL", "de", "istanbul"),
    ("می\u200cخواهم", "fa", "میخواهم"), ("\u202bשלום\u202c", "he", "שלום"),
]


@pytest.mark.parametrize("text, expected", ENGLISH)
def test_english(text, expected):
    assert data.normalize(text, "en") == expected


@pytest.mark.parametrize("text, expected", MANDARIN)
def test_mandarin(text, expected):
    scored = data.normalize(text, "zh")
    assert scored == data.normalize(expected, "zh") == data.normalize(text.lower(), "zh")
    folded = expected.translate(str.maketrans("两幺〇", "二一零"))
    assert scored.replace(" ", "") == folded.replace(" ", "")


@pytest.mark.parametrize("text, language, expected", OTHERS)
def test_other_languages_and_labels(text, language, expected):
    assert data.normalize(text, language) == unicodedata.normalize("NFKC", expected)


@pytest.mark.parametrize("language, name", [
    ("en", "WER"), ("de", "WER"), (None, "WER"), ("zh", "CER"), ("zh-TW", "CER"), ("en-zh", "CER"),
    ("cantonese", "CER"), ("ja", "CER"), ("ko-KR", "CER"), ("my", "CER"), ("ms-MY", "WER"),
    ("simplified chinese", "CER")])
def test_what_a_rate_is_called(language, name):
    assert data.rate_name(language) == name


def test_the_metric_has_a_version_and_its_spellings_are_whispers():
    assert data.METRIC == "opd-asr-3"
    raw = (Path(data.__file__).parent / ".assets" / "english.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest()[:16] == "6607f948be9824d2"
    assert len(json.loads(raw)) == 1739


# ---------------------------------------------------------------------------- counts

@pytest.mark.parametrize("ref, hyp, language, counts", [
    ("Don’t stop.", "don't STOP", "en", (0, 0, 0, 3)), ("打开 A 灯。", "打开ａ灯", "zh", (0, 0, 0, 4)),
    ("a b c", "a c", "en", (0, 1, 0, 3)), ("a c", "a b c", "en", (0, 0, 1, 2)),
    ("灯桌子窗", "桌子门门门", "zh", (1, 1, 2, 4)), ("a b c", "x b c d d", None, (1, 0, 2, 3)),
    ("", "a b", "en", (0, 0, 2, 0)), ("", "", "en", (0, 0, 0, 0))])
def test_both_sides_are_normalised_and_aligned(ref, hyp, language, counts):
    found = data.edit_counts(ref, hyp, language)
    assert found == counts and found.errors == sum(counts[:3])


# ---------------------------------------------------------------------------- intervals

def test_an_interval_is_reproducible_and_has_the_normal_width():
    rng = np.random.default_rng(9)
    units, errors = rng.integers(5, 20, 400), rng.poisson(1.0, 400)
    low, high = data.interval(data.bootstrap(errors, units, draws=5000))
    rate = errors.sum() / units.sum()
    deviation = np.sqrt(((errors - rate * units) ** 2).sum()) / units.sum()  # delta method
    assert (low, high) == pytest.approx((rate - 1.96 * deviation, rate + 1.96 * deviation),
                                        abs=0.15 * deviation)
    draws = data.bootstrap(errors, units)
    assert draws.shape == (1000,)
    np.testing.assert_array_equal(draws, data.bootstrap(errors, units))
    assert not np.array_equal(draws, data.bootstrap(errors, units, seed=1))


def test_systems_are_drawn_together():
    rng = np.random.default_rng(10)
    errors, units = rng.integers(0, 5, 60), rng.integers(5, 20, 60)
    pair = np.stack([errors, errors + 1], 1)
    rates = data.bootstrap(pair, np.stack([units, units], 1), draws=250)
    np.testing.assert_array_equal(rates[:, 0], data.bootstrap(errors, units, draws=250))
    low, high = data.interval(rates)
    assert data.interval(rates[:, 1]) == (low[1], high[1])
    width = np.ptp(rates[:, 1] - rates[:, 0])
    assert width < 0.3 * np.ptp(rates[:, 0])  # a difference varies less than either


def test_blocks_are_drawn_whole():
    # Each speaker says the same ten times over: ten times the clips, no more certainty.
    rng = np.random.default_rng(11)
    errors, units = rng.integers(0, 5, (40, 1)), rng.integers(5, 20, (40, 1))
    speakers = [f"speaker {i:02d}" for i in range(40)] * 10
    many = data.bootstrap(np.tile(errors, (10, 1)), np.tile(units, (10, 1)), speakers)
    np.testing.assert_allclose(many, data.bootstrap(errors, units))


def test_a_pooled_rate_keeps_the_mix_of_its_strata():
    """Voices of one language are alike: nothing varies but the mix, where it is not kept."""
    errors, units = [1] * 6 + [4] * 6, [100] * 12
    voices, languages = [f"voice {i}" for i in range(12)], ["en"] * 6 + ["zh"] * 6
    assert np.ptp(data.bootstrap(errors, units, voices)) > 0.01
    assert set(data.bootstrap(errors, units, voices, languages)) == {30 / 1200}
    # A stratum's own blocks are drawn: as much as it varies alone, by its share of the units.
    errors[:6] = [0, 2, 0, 2, 0, 2]
    alone = data.bootstrap(errors[:6], units[:6], voices[:6])
    both = data.bootstrap(errors, units, voices, languages)
    assert both.std() == pytest.approx(alone.std() / 2, rel=0.1)
    assert np.isnan(data.bootstrap([1, 2], [4, 5], strata=["en", "zh"])).all()


def test_an_interval_needs_enough_references():
    assert np.isnan(data.bootstrap([1], [4])).all()
    assert np.isnan(data.bootstrap([1, 2], [4, 5], ["a"] * 2)).all()
    assert all(map(math.isnan, data.interval(data.bootstrap([1, 2], [0, 0]))))
    few = data.bootstrap([1, 0, 0, 0], [4, 0, 0, 0])  # a third of the draws has no unit
    assert 0.2 < np.isnan(few).mean() < 0.45 and all(map(math.isnan, data.interval(few)))
    enough = data.bootstrap([1, 0, 0, 1], [4, 0, 3, 4])
    assert 0 < np.isnan(enough).mean() < 0.1
    assert data.interval(enough) == tuple(np.nanpercentile(enough, [2.5, 97.5]))
