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

MANDARIN = [  # as written, as said: one text, without the spaces between units
    # no number: nothing but script, width and punctuation changes
    ("", ""), ("。", ""), ("请，打开 A灯。", "请打开a灯"), ("“你好”；‘世界’！", "你好世界"), ("《书》、（笔）…【一】", "书笔一"), ("三 个\n瓶子", "三个瓶子"),
    ("it’s", "it's"), ("花儿开了啊", "花儿开了啊"), ("嗯，那个呃我在听", "嗯那个呃我在听"), ("一点一点地学", "一点一点地学"), ("乾隆皇帝很著名", "乾隆皇帝很著名"),
    ("開門，裡面請坐", "开门里面请坐"), ("ＯＫ，没问题", "ok没问题"), ("好\u263a\ufe0f", "好"), ("十有八九", "十有八九"), ("他万一来了", "他万一来了"),
    # quantities
    ("0", "零"), ("3", "三"), ("10", "十"), ("15", "十五"), ("20", "二十"), ("105", "一百零五"), ("1010", "一千零一十"), ("10203", "一万零二百零三"),
    ("105000", "十万五千"), ("100200", "十万零二百"), ("1,234,567", "一百二十三万四千五百六十七"), ("10,010,000", "一千零一万"), ("１，０００米", "一千米"),
    ("卖了3.5万册", "卖了三点五万册"), ("约450人", "约四百五十人"), ("200余种", "二百余种"), ("12345678人", "一千二百三十四万五千六百七十八人"), ("٣个", "三个"),
    ("-5度", "负五度"), ("气温-12度", "气温负十二度"), ("3.14", "三点一四"), ("0.05", "零点零五"), ("12.25元", "十二点二五元"), ("10.08秒", "十点零八秒"), ("1.2.3版", "一点二点三版"),
    # two, one, zero: how they are said differs, what is scored does not
    ("2个", "二个"), ("2匹马", "两匹马"), ("2双鞋", "两双鞋"), ("2朵花", "两朵花"), ("2年", "两年"), ("12个", "十二个"), ("第2名", "第二名"), ("2萬3千兩百點", "两万三千二百点"),
    ("200元", "两百元"), ("2.2个", "二点二个"), ("二〇二三年", "二零二三年"), ("二○○三年", "二零零三年"), ("○", ""), ("幺三八幺幺", "一三八一一"),
    # percent, fractions, ranges, signs
    ("3.5%", "百分之三点五"), ("100％", "百分之百"), ("百分之2点5", "百分之二点五"), ("20%-30%", "百分之二十到百分之三十"), ("15%～20%", "百分之十五到百分之二十"), ("3‰", "千分之三"),
    ("1/3的人", "三分之一的人"), ("大约1/4", "大约四分之一"), ("½", "二分之一"), ("3-5个", "三到五个"), ("20–30岁", "二十到三十岁"), ("8～10天", "八到十天"),
    ("7×24小时", "七乘二十四小时"), ("3×4=12", "三乘四等于十二"), ("1+1=2", "一加一等于二"), ("减去-7", "减去负七"), ("x≥6", "x大于等于六"),
    ("比分3:1", "比分三比一"),
    # dates and times
    ("2023年5月3日", "二零二三年五月三日"), ("2021-09-30", "二零二一年九月三十日"), ("1999/12/31", "一九九九年十二月三十一日"), ("1997.07.01", "一九九七年七月一日"),
    ("1998-2000年", "一九九八到二零零零年"), ("1998–2000年", "一九九八到二零零零年"), ("98年", "九十八年"), ("80后", "八零后"), ("2月2号", "二月二号"), ("90年代", "九十年代"),
    ("9:05出发", "九点零五分出发"), ("14:30开会", "十四点三十分开会"), ("7:08:09", "七点零八分九秒"), ("9:30am", "上午九点三十分"), ("15:00-16:00", "十五点到十六点"),
    # money and units
    ("￥9.9", "九点九元"), ("$250", "二百五十美元"), ("A$13", "十三澳元"), ("HKD88", "八十八港元"), ("hkd88", "八十八港元"), ("70kg", "七十千克"), ("70KG", "七十千克"), ("80㎡", "八十平方米"),
    ("6km²", "六平方千米"), ("39℃", "三十九摄氏度"), ("80km/h", "每小时八十公里"), ("300ml水", "三百毫升水"), ("5mm", "五毫米"),
    # digit by digit
    ("13800138000", "一三八零零一三八零零零"), ("138-0013-8000", "一三八零零一三八零零零"), ("010-67891234", "零一零六七八九一二三四"), ("007", "零零七"),
    ("拨打110", "拨打幺幺零"), ("尾号6021", "尾号六零二一"), ("10.0.0.1", "一零点零点零点一"),
    # among letters
    ("5G网络", "五g网络"), ("5g网络", "五g网络"), ("4K电视", "四k电视"), ("A4纸", "a四纸"), ("COVID-19", "covid十九"), ("O2O", "otoo"), ("b2b", "btob"), ("iPhone 15", "iphone十五"),
    ("买3个iPad", "买三个ipad"), ("\"7\"和(8)", "七和八"), ("{6}\\9", "六九"),
]

OTHERS = [
    ("Straße 7", "de", "straße 7"), ("L’été, c’est 3.5%", "fr", "l'été c'est 3.5"), ("Cafe\u0301", "fr", "café"), ("हिन्दी", "hi", "हिन्दी"),
    ("東京タワー 3階", "ja", "東 京 タ ワ ー 3 階"), ("안녕 하세요", "ko", "안 녕 하 세 요"), ("2個", "yue", "二 个"),
    ("我们明天有个 Meeting，OK？", "zh-en", "我 们 明 天 有 个 meeting ok"), ("Don’t买3个iPhone 15", "en-zh", "don't 买 三 个 iphone 十 五"),
    ("İzmir IŞIK", "tr", "izmir ışık"), ("Iğdır", "az", "ığdır"), ("I", "tr-TR", "ı"), ("ISTANBUL", "de", "istanbul"),
    ("می\u200cخواهم", "fa", "میخواهم"), ("ක්\u200dරම", "si", "ක්රම"), ("\u202bשלום\u202c", "he", "שלום"), ("a\u2066b\u2069c", "de", "abc"), ("\u200eword\u200f", "en", "word"),
    ("deadline是2023年", "zh_en", "deadline 是 二 零 二 三 年"), ("", "zh-en", ""),
]


@pytest.mark.parametrize("text, expected", ENGLISH)
@pytest.mark.parametrize("language", ["en", "en-US", "English"])
def test_english(text, expected, language):
    assert data.normalize(text, language) == expected


@pytest.mark.parametrize("text, expected", MANDARIN)
@pytest.mark.parametrize("language", ["zh", "zh-CN", "cmn"])
def test_mandarin(text, expected, language):
    scored = data.normalize(text, language)
    assert scored == data.normalize(expected, language)
    assert scored == data.normalize(scored.replace(" ", ""), language)  # what was written as normalised stays
    # The right side is said as it is scored, but for what is folded.
    assert scored == " ".join(expected.translate(str.maketrans("两幺〇", "二一零")))


def test_case_does_not_count():
    for text, _ in MANDARIN:
        assert data.normalize(text.upper(), "zh") == data.normalize(text.lower(), "zh")


@pytest.mark.parametrize("text, language, expected", OTHERS)
def test_other_languages(text, language, expected):
    assert data.normalize(text, language) == unicodedata.normalize("NFC", expected)


def test_the_table_is_as_long_as_promised():
    assert len(MANDARIN) >= 100 and len(ENGLISH) + len(OTHERS) >= 60 and data.NORMALISER == "opd-asr-2"


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
