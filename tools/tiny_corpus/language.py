"""Knowledge of words: translation, opposites, plurals, past tense, categories, Chinese measure words."""

from __future__ import annotations

from .core import Example, Task, from_table
from .vocabulary import NOUNS, PAIRS, Noun, read_pairs


def _to_chinese(english: str, chinese: str) -> Example:
    return Example(
        key=english,
        answer=chinese,
        statements=(
            f"{english} in Chinese is {chinese}.",
            f"The Chinese word for {english} is {chinese}.",
            f"英语单词 {english} 的意思是 {chinese}。",
            f"{english} 的中文是{chinese}。",
            f"{english} = {chinese}",
        ),
        questions=(
            (f"What is {english} in Chinese?", ""),
            (f"{english} 的中文是什么?", ""),
            (f"How do you say {english} in Chinese?", ""),
            ("What is this in Chinese?", english),
            ("这个单词的中文是什么?", english),
            (f"Give a translation of {english} into Chinese.", ""),
            (f"用中文说出 {english}。", ""),
            (f"{english} 翻译成中文是什么?", ""),
            ("Translate this to Chinese.", english),
            ("翻译成中文。", english),
        ),
        rows=(
            ("Translate the word into Chinese.", english),
            (f"Translate {english} into Chinese.", ""),
            ("把下面的英文单词翻译成中文。", english),
        ),
    )


def _to_english(chinese: str, english: str) -> Example:
    return Example(
        key=english,
        answer=english,
        statements=(
            f"{chinese} in English is {english}.",
            f"The English word for {chinese} is {english}.",
            f"{chinese}的英文是 {english}。",
            f"中文{chinese}用英语说是 {english}。",
            f"{chinese} = {english}",
        ),
        questions=(
            (f"What is {chinese} in English?", ""),
            (f"{chinese}的英文是什么?", ""),
            (f"How do you say {chinese} in English?", ""),
            ("What is this in English?", chinese),
            ("这个词的英文是什么?", chinese),
            (f"Give a translation of {chinese} into English.", ""),
            (f"用英文说出{chinese}。", ""),
            (f"{chinese}翻译成英文是什么?", ""),
            ("Translate this to English.", chinese),
            ("翻译成英文。", chinese),
        ),
        rows=(
            ("Translate the word into English.", chinese),
            (f"请把{chinese}翻译成英文。", ""),
            ("把下面的词翻译成英文。", chinese),
        ),
    )


def _opposite(word: str, other: str) -> Example:
    return Example(
        key=" ".join(sorted((word, other))),
        answer=other,
        statements=(
            f"The opposite of {word} is {other}.",
            f"{word} is the opposite of {other}.",
            f"Not {word} but {other}.",
            f"{word} and {other} are opposites.",
        ),
        questions=(
            (f"What is the opposite of {word}?", ""),
            (f"{word} is the opposite of what?", ""),
            ("What is the opposite of this word?", word),
            ("What is its opposite?", word),
            (f"Which word is an antonym of {word}?", ""),
            (f"Name a word with the opposite meaning of {word}.", ""),
            (f"What means the opposite of {word}?", ""),
            ("What is the antonym here?", word),
            ("Write its antonym.", word),
        ),
        rows=(
            ("Give the antonym of the word.", word),
            (f"Write the word that means the opposite of {word}.", ""),
            (f"Give an antonym for {word}.", ""),
        ),
    )


def _opposite_zh(word: str, other: str) -> Example:
    return Example(
        key=" ".join(sorted((word, other))),
        answer=other,
        statements=(
            f"{word}的反义词是{other}。",
            f"{word}和{other}意思相反。",
            f"和{word}相反的是 {other}。",
            f"不是{word},而是{other}。",
        ),
        questions=(
            (f"{word}的反义词是什么?", ""),
            (f"和{word}相反的是什么?", ""),
            ("这个词的反义词是什么?", word),
            ("和它相反的是什么?", word),
            (f"说出{word}的反义词。", ""),
            (f"与{word}意思相反的是哪个词?", ""),
            ("写出它的反义词。", word),
            ("给出反义词。", word),
        ),
        rows=(
            ("写出下面词语的反义词。", word),
            (f"请写出与{word}意思相反的词。", ""),
            (f"请给出{word}的反义词。", ""),
        ),
    )


def _plural(word: str, plural: str) -> Example:
    return Example(
        key=word,
        answer=plural,
        statements=(
            f"One {word}, two {plural}.",
            f"The plural of {word} is {plural}.",
            f"There is one {word} here and there are many {plural} there.",
        ),
        questions=(
            (f"What is the plural of {word}?", ""),
            (f"One {word}, two what?", ""),
            ("What is the plural of this word?", word),
            (f"Write {word} in the plural.", ""),
            (f"Which form is the plural of {word}?", ""),
            ("Give its plural form.", word),
            ("Put this noun into the plural.", word),
        ),
        rows=(
            ("Write the plural form of the noun.", word),
            (f"Give the plural form of {word}.", ""),
        ),
    )


def _past(verb: str, past: str) -> Example:
    return Example(
        key=verb,
        answer=past,
        statements=(
            f"The past tense of {verb} is {past}.",
            f"Today I {verb}, yesterday I {past}.",
            f"Now they {verb}. Last year they {past}.",
        ),
        questions=(
            (f"What is the past tense of {verb}?", ""),
            (f"Today I {verb}, yesterday I what?", ""),
            ("What is the past tense of this word?", verb),
            (f"Say the verb {verb} in the past tense.", ""),
            (f"Which form is the past of {verb}?", ""),
            ("Write this verb in the past form.", verb),
            ("Give its past tense.", verb),
        ),
        rows=(
            ("Put the verb into the past tense.", verb),
            (f"Write the past form of the verb {verb}.", ""),
        ),
    )


def _category(noun: Noun) -> Example:
    word, kind = noun.english, noun.category
    return Example(
        key=word,
        answer=kind,
        statements=(
            f"{word} is a kind of {kind}.",
            f"The word {word} belongs to the group {kind}.",
            f"{word}: {kind}.",
        ),
        questions=(
            (f"What kind of thing is {word}?", ""),
            (f"Which group does {word} belong to?", ""),
            ("What kind of thing is this?", word),
            ("Which group does it belong to?", word),
            (f"Which category does {word} belong to?", ""),
            (f"Give the category of {word}.", ""),
            ("What is the category?", word),
            ("Say the category of the word.", word),
        ),
        rows=(
            ("Name the category of this word.", word),
            (f"Put {word} into a category.", ""),
        ),
    )


def _category_zh(noun: Noun) -> Example:
    word, kind = noun.chinese, noun.category_zh
    return Example(
        key=noun.english,
        answer=kind,
        statements=(f"{word}是一种{kind}。", f"{word}属于 {kind}。", f"{word}:{kind}。"),
        questions=(
            (f"{word}是一种什么?", ""),
            (f"{word}属于什么?", ""),
            ("这是一种什么?", word),
            ("它属于什么?", word),
            (f"{word}属于哪一类?", ""),
            (f"{word}的类别是什么?", ""),
            ("说出它的类别。", word),
            ("判断它是哪一类。", word),
        ),
        rows=(
            ("判断下面的词属于哪一类。", word),
            (f"请说出{word}的类别。", ""),
        ),
    )


def _measure(noun: Noun) -> Example:
    word, measure = noun.chinese, noun.measure
    return Example(
        key=noun.english,
        answer=measure,
        statements=(
            f"这里有一{measure}{word}。",
            f"{word}的量词是{measure}。",
            f"三{measure}{word},五{measure}{word}。",
            f"数{word}用 {measure}。",
        ),
        questions=(
            (f"{word}的量词是什么?", ""),
            (f"数{word}用什么量词?", ""),
            ("这个词的量词是什么?", word),
            ("数它用什么量词?", word),
            (f"一( ){word},填什么量词?", ""),
            (f"给{word}配上量词。", ""),
            ("写出合适的量词。", word),
            ("给名词配上量词。", word),
        ),
        rows=(
            ("给下面的名词配上合适的量词。", word),
            (f"请填写量词:一( ){word}。", ""),
        ),
    )


def tasks() -> list[Task]:
    """Every task about words."""
    both = [pair for a, b in read_pairs("opposites") for pair in ((a, b), (b, a))]
    opposites = dict(reversed(both))
    both_zh = [pair for a, b in read_pairs("opposites_zh") for pair in ((a, b), (b, a))]
    measured = [noun for noun in NOUNS if noun.measure]
    return [
        Task("to_chinese", from_table([_to_chinese(*p) for p in PAIRS]), True, 2.0, family="translate"),
        Task("to_english", from_table([_to_english(b, a) for a, b in PAIRS]), True, 2.0, family="translate"),
        Task("opposite", from_table([_opposite(a, b) for a, b in opposites.items()]), True),
        Task("opposite_zh", from_table([_opposite_zh(a, b) for a, b in both_zh]), True),
        Task("plural", from_table([_plural(*p) for p in read_pairs("plurals")]), True),
        Task("past_tense", from_table([_past(*p) for p in read_pairs("past_tenses")]), True),
        Task("category", from_table([_category(n) for n in NOUNS]), True, 1.2, family="category"),
        Task("category_zh", from_table([_category_zh(n) for n in NOUNS]), True, 1.2, family="category"),
        Task("measure_zh", from_table([_measure(n) for n in measured]), True, 1.2),
    ]
