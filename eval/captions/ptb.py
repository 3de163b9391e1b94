"""Words of a caption as coco-caption counts them: Penn-Treebank-like tokens, lower case, punctuation dropped.

Caption metrics differ by several points with the tokenizer, so the tokenizer is part of the metric. The field's is
Stanford's PTBTokenizer (CoreNLP 3.4.1, -lowerCase) followed by coco-caption's list of dropped punctuation; it needs
Java. This one follows its rules for English, found by looking at what it answers:

    text --the longest match at each place--> tokens --lower case, marks as it writes them--> minus punctuation

Not followed: numbers that hold a space (a telephone number is three words here, one there) and a caption that ends in
a lone letter and a full stop, whose full stop depends there on how the next caption of the file begins.
"""

from __future__ import annotations

import re

_LETTER = r"[^\W\d_]"
_ALNUM = r"(?:[^\W_]|[\u0300-\u036f])"
_APOSTROPHE = "['’]"
_NUMBER = r"(?:\d*(?:[.,:]\d+)+|\d+(?:[.,:]\d+)*)"
_ELISION = rf"(?:[dDlLoO]{_APOSTROPHE}(?={_ALNUM}))?"  # d'art, l'eau, o'clock
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_ABBREVIATIONS = (
    r"adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|attys?|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|calif|capt|cf|"
    r"cie|cmdr|col|colo|comdr|conn|corp|cos?|cpl|ct|dak|dec|dept|det|drs?|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|"
    r"gen|govs?|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kans?|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|"
    r"mlle|mme|mo|mon|mont|mrs?|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph\.d|ph|plc|profs?|pt[ey]|pvt|rd|"
    r"reps?|rev|rt|sens?|sept?|seq|sfc|sgt|spc|sq|sr|ste?|supts?|sys|tel|tenn|thu|thurs|treas|tues?|univ|va|viz|vs|vt|"
    r"wed|wisc?|wm|wyo"
)
_STATES = "Ark|ARK|Az|AZ|Del|DEL|Ill|ILL|La|LA|Mass|MASS|Miss|MISS|Ore|ORE|Pa|PA|Tex|TEX|Wash|WASH"
_BEFORE_NUMBERS = "arts?|ca|figs?|nos?|op|pp|prop"
_SENTENCE_STARTS = (
    r"A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|"
    r"One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|re|ve|ll|RE|VE|LL)(?!{_LETTER})"
_SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z])"
_SPECIAL = "|".join(
    (*(rf"{word}{_APOSTROPHE}" for word in ("y", "j", "somethin", "dunkin")), rf"ol{_APOSTROPHE}(?!{_LETTER})",
     *(rf"{before}{_APOSTROPHE}{after}" for before, after in (("c", "mon"), ("c", "est"), ("cap", "n"), ("e", "er"))))
)  # fmt: skip

# Every alternative is tried at a place and the longest wins, the first among equals. Where an alternative has a group,
# the group is the token and the rest is only looked at, yet counts for the length.
_RULES = tuple(
    re.compile(rule)
    for rule in (
        rf"({_LETTER}{_ALNUM}*){_CLITIC}",  # dog + 's
        rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*",  # word, and word.word
        rf"[-+]?{_NUMBER}",
        rf"{_ELISION}{_ALNUM}+(?:[-‐‑]{_ELISION}{_ALNUM}+)*",  # t-shirt, 5-year-old, o'clock
        rf"{_ALNUM}(?:{_ALNUM}|[.,])*(?:-(?:{_ALNUM}+|{_ACRONYM}\.))+",  # 1.5-inch, U.S.-made
        rf"{_ALNUM}+(?:[-_]{_ALNUM}+)+",
        rf"{_ALNUM}+(?:-{_LETTER}+){{0,2}}(?:/{_ALNUM}+(?:-{_LETTER}+){{0,2}}){{1,2}}",  # black/white, 1/2
        r"[A-Z]+(?:[&+][A-Z]+)+",  # AT&T
        r"[Cc](?:\+\+|#)",
        rf"({_LETTER}*[A-MO-Za-mo-z])[nN]{_APOSTROPHE}[tT](?!{_LETTER})",  # do + n't
        rf"[nN]{_APOSTROPHE}[tT](?!{_LETTER})",
        _CLITIC,
        rf"(?i:{_SPECIAL})",
        rf"(?i:{_APOSTROPHE}(?:n{_APOSTROPHE}|(?:em|till?|cause|[1-9]0s|n)(?!{_ALNUM})))",
        r"'[0-9][0-9](?=\s|$)",
        rf"[A-HJ-XZn]{_APOSTROPHE}{_LETTER}{{2,}}",  # B'Gosh
        rf"{_LETTER}+[aeiouAEIOU]{_APOSTROPHE}[aeiouA-Z]{_LETTER}*",  # ma'am
        r"(?i:('t)(?:is|was)(?![a-z]))",
        rf"(?i:(?:{_ABBREVIATIONS})\.)|(?:{_STATES})\.",
        rf"(?i:(?:{_BEFORE_NUMBERS})\.(?=\s*\d))",
        rf"{_ACRONYM}\.",
        rf"[A-Za-z]\.(?!\s+(?:{_SENTENCE_STARTS})\b)",  # J. Smith, but not "and I. The"
        r"https?://[^\s<>|]+[^\s<>|.!?,;:&\"'*()\]}-]",
        r"(?:www\.(?:[^\s`<>|.!?,]+\.)+[a-zA-Z]{2,4}|(?:[^\s`<>|.!?,:/$()]+\.)+(?:com|net|org|edu))(?:/[^\s<>|]*\w)?",
        rf"{_ALNUM}+\.(?:avi|docx?|gif|html?|jpe?g|mov|mp[34]|mpeg|pdf|png|pptx?|txt|wav|zip)",
        r"[a-zA-Z0-9][^\s\"<>|()]*@[^\s\"<>|().,;:]+(?:\.[^\s\"<>|().,;:]+)*",
        rf"@[A-Za-z_]\w*|#{_LETTER}+",
        r"</?[A-Za-z][A-Za-z0-9_]*(?: [^<>]*)?/?>",
        _SMILEY,
        r"[-^x=~<>']_[-^x=~<>']",
        r"[A-Z]*\$",
        r"[!?]+|\.{3,}|-+|\*+|_+|#+|@+|<<|>>",
        r"[\u0021-\u007e\u00a1-\u00ac\u00ae-\u00bf\u00d7\u00f7\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2100-\u2bff]",
    )
)
_CLITICS = re.compile(rf"{_CLITIC}|[nN]{_APOSTROPHE}[tT]")
_SMILEYS = re.compile(_SMILEY)
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|$)")
_SPLIT = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}
_WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$", "¢": "cents",
}  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))
_DROPPED = frozenset(["..", "...", "--", "---", "----", *".?!,:;-'\"`‘’‛“”‹›«»‐‑‒–—―…"])


def ptb_words(text: str) -> list[str]:
    """Lower-case tokens of an English caption without punctuation: "A dog's tail." gives a, dog, 's, tail.

    Brackets stay, as -lrb- and -rrb-: coco-caption's list names them in upper case, and so misses them.
    """
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0]], text.replace("\u00ad", ""))
    words: list[str] = []
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        token = _token(text, place)
        place += max(len(token), 1)
        if token and token not in _DROPPED and not re.fullmatch(r"\.{3,}", token):
            cut = _SPLIT.get(token.lower(), len(token))
            words += [_written(part) for part in (token[:cut], token[cut:]) if part]
    return words


def _token(text: str, place: int) -> str:
    """The token that begins at `place`; empty where a character belongs to none, such as an emoji."""
    plain = _PLAIN.match(text, place)
    if plain:
        return plain[0]
    longest, token = 0, ""
    for rule in _RULES:
        found = rule.match(text, place)
        if found and found.end() - place > longest:
            longest, token = found.end() - place, found[rule.groups]
    return token


def _written(token: str) -> str:
    """As the tokenizer of the field writes a token."""
    if _CLITICS.fullmatch(token):
        token = token.replace("’", "'")
    elif _SMILEYS.fullmatch(token):
        token = "".join(_WRITTEN.get(mark, mark) for mark in token)
    return _WRITTEN.get(token, token.lower())
