"""The language of a text: its script, and for Latin letters its most common small words.

Meant to find the rows of a dataset that are in another language than the rest. It says nothing rather than
something wrong: code, names, numbers and texts of a few words have none.
"""

from __future__ import annotations

import re
from collections import Counter

_LOOKED_AT = 1_000  # characters of a text
_FEWEST_LETTERS = 4
_FEWEST_WORDS = 3  # different small words of a language
_CLEAR = 1.5  # times those of the next language

# Scripts that stand for one language, or for a family that small words would have to tell apart.
_SCRIPTS = {
    "Japanese": "\u3040-\u30ff",
    "Korean": "\u1100-\u11ff\uac00-\ud7af",
    "Chinese": "\u4e00-\u9fff",
    "Cyrillic": "\u0400-\u04ff",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Thai": "\u0e00-\u0e7f",
}
_SMALL_WORDS = {
    "English": "the and of to is you that it for was are with his they this have from not what were when "
    "your can there how which their will would my if do has been who did get i me we our be at by "
    "does",
    "German": "der die das und ist nicht ich sie ein eine zu den mit auf für von dem im auch es wie dass "
    "wird aber sich bei noch nach wenn oder kann mein meine haben war wir was wo er bitte",
    "French": "le la les des est et que une dans pour pas qui sur avec ce plus je vous il au par sont nous "
    "mon ma elle mais du comment cette être ai votre ont de un ne se en",
    "Spanish": "el la los las que y en un una es por con para del se no su al lo como más pero sus le mi "
    "está cómo qué puedo este ya muy también de hay cuando",
    "Portuguese": "o os as que e do da em um uma para com não no na por mais dos como mas ao ele das seu sua "
    "ou quando muito já eu também meu minha está você de é isso são foi",
    "Italian": "il di che la e un una per non sono è con del le della si da i gli lo ma come anche più nel "
    "alla questo mio mia ho ha dei al cosa quando perché",
    "Dutch": "de het een en van ik te dat die niet op aan met voor er maar om hem dan zou wat mijn ze bij "
    "ook naar heeft hoe kan wordt is zijn deze hebben",
    "Polish": "nie się w i na jest to że z do jak co ale po czy o tak za od mnie już był tylko może przez "
    "moja",
    "Swedish": "och att det som en på är av för med den till inte om har de ett men var jag kan från vi så "
    "min",
    "Turkish": "bir ve bu için ile da de ne ben çok daha var mı gibi ama kadar değil nasıl olarak sonra "
    "benim",
    "Indonesian": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke bisa ada apa "
    "adalah bagaimana kami anda",
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _SMALL_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
_KNOWN = frozenset(_LANGUAGES_OF)
_WORD = re.compile(r"[^\W\d_]+")
_OTHER_SCRIPT = re.compile("|".join(f"(?P<{name}>[{range_}])" for name, range_ in _SCRIPTS.items()))


def language(text: str) -> str | None:
    """English name of a text's language (or of its script); None where that is not clear."""
    text = text[:_LOOKED_AT].lower()
    letters = text if text.isascii() else "".join(_WORD.findall(text))
    if not letters.isascii():
        scripts = Counter(match.lastgroup for match in _OTHER_SCRIPT.finditer(letters))
        if 2 * scripts.total() > len(letters) >= _FEWEST_LETTERS:
            # Japanese mixes its own letters with Chinese ones.
            return "Japanese" if scripts["Japanese"] else scripts.most_common(1)[0][0]
    small = _KNOWN.intersection(_WORD.findall(text))
    met = Counter([name for word in small for name in _LANGUAGES_OF[word]])
    if not met:
        return None
    (best, count), (_, next_count) = [*met.most_common(2), ("", 0)][:2]
    return best if count >= max(_FEWEST_WORDS, _CLEAR * next_count) else None
