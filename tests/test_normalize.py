"""The normaliser as a table: what is scored, case by case. A change here is another metric and needs another data.NORMALISER.

    pytest tests/test_normalize.py
"""

import hashlib
import json
import random
import unicodedata
from pathlib import Path

import pytest

import data

ENGLISH = [
    ("", ""), ("...", ""), ("%", ""), ("Hello, World!", "hello world"),
    # apostrophes and quotation marks
    ("Don’t  STOP—it’s", "do not stop it is"), ("don't", "do not"), ("don`t don´t donʼt don＇t", "do not do not do not do not"),
    ("“Well,” she said; ‘so’ it goes", "well she said so it goes"), ("he said 're-do' and ‘d’", "he said re do and d"),
    ("rock 'n' roll", "rock n roll"), ("it 's", "it is"), ("do n't", "do not"), ("the dogs' tails", "the dogs tails"),
    ("y'all can't, I'll, we've, I'm, they're", "you all can not i will we have i am they are"), ("won't gonna wanna", "will not going to want to"),
    ("O'Brien", "obrien"), ("O’Neill's", "oneill is"), ("3,000 o'clock", "3000 oclock"), ("three o clock", "3 oclock"),
    # nothing is erased because of the bracket it stands in
    ("(laughs) yes [noise] <unk> {x}", "laughs yes noise unk x"), ("(all of it)", "all of it"), ("[um]", "um"),
    ("um", "um"), ("Uh, hmm.", "uh hmm"), ("uh hello um", "hello"),
    # numbers
    ("3.5%", "3.5%"), ("three point five percent", "3.5%"), ("3.5 %", "3.5%"), ("0.5", "0.5"), ("3.1 and 1.5", "3.1 and 1.5"),
    ("one", "one"), ("1", "one"), ("twenty-three", "23"), ("2023", "2023"), ("twenty twenty three", "2023"), ("nineteen ninety nine", "1999"),
    ("the '90s", "the 90s"), ("21st, 2nd", "21st 2nd"), ("twenty first", "21st"), ("three hundred and five", "305"), ("1,000,000", "1000000"),
    ("one million", "1000000"), ("1,2,3", "one 2 3"), ("0171 555 0199", "0171 555 0199"), ("555-0199", "555 0199"),
    ("double o seven", "007"), ("007", "007"), ("one oh one", "101"), ("$20 million", "$20000000"), ("£1 and $ 5", "£1 and $5"),
    ("10:05", "10 05"), ("-5", "5"),
    # letters
    ("Mr. Smith vs. Dr. Jones", "mister smith vs doctor jones"), ("U.S.A.", "u s a"), ("AT&T", "at t"), ("e-mail", "e mail"),
    ("colour centre analyse", "color center analyze"), ("Café naïve", "cafe naive"), ("ﬁne", "fine"), ("ＡＢＣ　１２３", "abc 123"),
    ("a\u00a0b\tc\n", "a b c"), ("snake_case", "snake case"), ("put 杯子 here", "put 杯子 here"),
]

MANDARIN = [  # without the spaces between units
    ("", ""), ("。", ""), ("请，打开 A灯。", "请打开a灯"), ("“你好”；‘世界’！", "你好世界"), ("《书》、（笔）…【一】", "书笔一"), ("三 个\n瓶子", "三个瓶子"),
    ("ＡＢ　１２", "ab十二"), ("it’s", "it's"),
    # quantities
    ("3", "三"), ("0", "零"), ("10", "十"), ("15", "十五"), ("20", "二十"), ("110", "一一零"), ("110个", "一百一十个"), ("105", "一百零五"), ("1010", "一千零一十"),
    ("10000", "一万"), ("10203", "一万零二百零三"), ("105000", "十万五千"), ("100200", "十万零二百"), ("1,234,567", "一百二十三万四千五百六十七"),
    ("100,005,000", "一亿零五千"), ("10,010,000", "一千零一万"), ("1,000,000,000", "十亿"), ("１，０００", "一千"), ("-5度", "负五度"), ("3-5个", "三到五个"),
    ("3.14", "三点一四"), ("0.05", "零点零五"), ("3.5%", "百分之三点五"), ("100％", "百分之百"), ("20%-30%", "百分之二十到百分之三十"), ("气温-5度", "气温负五度"), ("80后", "八零后"), ("2名", "二名"),
    ("2次元", "二次元"), ("2次", "二次"), ("百分之2点5", "百分之二点五"), ("好\u263a\ufe0f", "好"), ("3\u00bd", "三二分之一"), ("3.5万", "三点五万"), ("1.2.3", "一点二点三"),
    # two
    ("2个", "二个"), ("两个", "二个"), ("2年", "二年"), ("12个", "十二个"), ("第2名", "第二名"), ("2萬3千兩百點", "二万三千二百点"), ("2小時", "二小时"), ("2月2号", "二月二号"), ("2年级", "二年级"), ("200元两百元", "二百元二百元"),
    ("2.2个", "二点二个"), ("两", "二"),
    # digit by digit
    ("2023年5月3日", "二零二三年五月三日"), ("1998-2000年", "一九九八到二零零零年"), ("1998–2000年，1998～2000年", "一九九八到二零零零年" * 2), ("2023", "二千零二十三"), ("98年", "九十八年"), ("12023年", "一二零二三年"),
    ("13800138000", "一三八零零一三八零零零"), ("138-0013-8000", "一三八零零一三八零零零"), ("010-67891234", "零一零六七八九一二三四"),
    ("007", "零零七"), ("1234567", "一百二十三万四千五百六十七"), ("123456", "十二万三千四百五十六"),
    # one spelling of what is said alike
    ("二〇二三年", "二零二三年"), ("二○○三年", "二零零三年"), ("○", ""), ("幺三八幺幺", "一三八一一"), ("老幺", "老一"), ("一点一点", "一点一点"),
]

OTHERS = [
    ("Straße 7", "de", "straße 7"), ("L’été, c’est 3.5%", "fr", "l'été c'est 3.5"), ("Cafe\u0301", "fr", "café"), ("हिन्दी", "hi", "हिन्दी"),
    ("東京タワー 3階", "ja", "東 京 タ ワ ー 3 階"), ("안녕 하세요", "ko", "안 녕 하 세 요"), ("2個", "yue", "二 个"),
    ("我们明天有个 Meeting，OK？", "zh-en", "我 们 明 天 有 个 meeting ok"), ("Don’t买3个iPhone 15", "en-zh", "don't 买 三 个 iphone 十 五"),
    ("deadline是2023年", "zh_en", "deadline 是 二 零 二 三 年"), ("", "zh-en", ""),
]


@pytest.mark.parametrize("text, expected", ENGLISH)
@pytest.mark.parametrize("language", ["en", "en-US", "English"])
def test_english(text, expected, language):
    assert data.normalize(text, language) == expected


@pytest.mark.parametrize("text, expected", MANDARIN)
@pytest.mark.parametrize("language", ["zh", "zh-CN", "cmn"])
def test_mandarin(text, expected, language):
    assert data.normalize(text, language) == " ".join(expected)
    assert data.normalize(expected, language) == " ".join(expected)  # what was written as normalised stays


@pytest.mark.parametrize("text, language, expected", OTHERS)
def test_other_languages(text, language, expected):
    assert data.normalize(text, language) == unicodedata.normalize("NFC", expected)


def test_the_table_is_as_long_as_promised():
    assert len(ENGLISH) + len(MANDARIN) + len(OTHERS) >= 60 and data.NORMALISER == "opd-asr-2"


@pytest.mark.parametrize("language, name", [
    ("en", "WER"), ("de", "WER"), ("zh", "CER"), ("ZH-TW", "CER"), ("yue", "CER"), ("ja", "CER"), ("ko", "CER"), ("th", "CER"), ("mandarin", "CER"), ("Chinese", "CER"), ("Cantonese", "CER"), ("cmn", "CER"), ("English", "WER"),
    ("zh-en", "MER"), ("en-zh", "MER"), ("en_ZH", "MER"), ("yue-en", "MER"), ("en-US", "WER"), ("zh-cn", "CER")])
def test_the_language_decides_the_metric(language, name):
    assert data.metric(language) == name


def test_spellings_are_whispers():
    raw = (Path(data.__file__).parent / ".assets" / "english.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465" and len(json.loads(raw)) == 1739


@pytest.mark.parametrize("language", ["en", "zh", "zh-en", "de", "ja"])
def test_text_is_never_erased(language):
    rng = random.Random(0)
    pieces = list("aoO19０½ ,.'’()[]<>{}%$£-你两2○〇幺") + ["um", "uh", "mm", "o'", "oh", "point", "and", "double", "plus", "minus", "per", "cent", "0", "ones", "\u0301"]
    pieces += [chr(c) for c in (0x1F600, 0x0E01, 0x0E31, 0xAC00, 0x30A2, 0x0660, 0x216B, 0x2160, 0xFB01, 0x00DF, 0x0130)]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        out = data.normalize(text, language)
        assert out == " ".join(out.split()) and data.normalize(text, language) == out
        said = any(map(str.isalnum, unicodedata.normalize("NFKC", text)))
        assert bool(out) == said or not said and all(unicodedata.category(c)[0] == "M" for c in out.replace(" ", "")), text


DIGITS = "零一二三四五六七八九"


def value(said):
    """The number that hanzi say, by adding up. The oracle of numbers as they are read out."""
    total = 0
    section = 0
    digit = 0
    for c in said:
        if c in DIGITS:
            digit = DIGITS.index(c)
        elif c in "十百千":
            section += (digit or 1) * 10 ** ("十百千".index(c) + 1)
            digit = 0
        else:
            total += (section + digit) * {"万": 10 ** 4, "亿": 10 ** 8}[c]
            section = 0
            digit = 0
    return total + section + digit


def test_numbers_of_things_say_their_value():
    """Before a measure word: alone, some numbers are telephone numbers, read digit by digit."""
    rng = random.Random(1)
    numbers = list(range(1200))
    numbers += [rng.randrange(10 ** rng.randint(1, 12)) for _ in range(2000)]
    for digits in (1, 11, 20):
        for zeros in range(10):
            numbers += [digits * 10 ** zeros + last for last in (0, 1, 10)]
    for n in numbers:
        said = data.normalize(f"{n}个", "zh").replace(" ", "")
        assert said.endswith("个")
        said = said.removesuffix("个")
        assert value(said) == n, said
        assert "零零" not in said
        assert n == 0 or not said.endswith("零"), (n, said)
