"""Languages of sentences that people would say, and silence where there is none."""

import pytest

from keras_gemma_ft.data.language import language

SENTENCES = [
    ("English", "How do I get a new card? I can't find it."),
    ("English", "This is what they said when we were there."),
    ("German", "Wo ist meine Karte? Ich habe sie noch nicht."),
    ("German", "Das wird nicht mehr gehen, wenn er es weiß."),
    ("French", "Où est ma carte ? Je ne l'ai pas reçue."),
    ("French", "Il y a une erreur sur le compte, que faire avec ça ?"),
    ("Spanish", "No sé dónde está la tarjeta, ¿cómo la cancelo?"),
    ("Spanish", "El pago se hizo con la otra cuenta y no sé qué es."),
    ("Portuguese", "Onde está o meu cartão? Eu não recebi."),
    ("Portuguese", "Isso não foi você, já é a minha conta."),
    ("Italian", "Dove è la mia carta? Non la ho più."),
    ("Italian", "Il conto è chiuso e non so perché, cosa si fa?"),
    ("Dutch", "Waar is mijn kaart? Ik heb het niet."),
    ("Dutch", "Hoe kan het dat de betaling er niet op staat?"),
    ("Polish", "Gdzie jest moja karta? Nie mam jej od tygodnia, co teraz?"),
    ("Polish", "Czy to już było, bo nie wiem, jak się loguje?"),
    ("Swedish", "Var är mitt kort? Jag har inte fått det."),
    ("Swedish", "Det är en betalning som vi inte kan se på kontot."),
    ("Turkish", "Kartım nerede, bu ne kadar daha sürer ve nasıl?"),
    ("Turkish", "Ben bir hesap için çok bekledim ama daha yok."),
    ("Indonesian", "Di mana kartu saya? Saya tidak bisa pakai ini."),
    ("Indonesian", "Apa yang bisa kami lakukan dengan akun itu?"),
    ("Cyrillic", "Где моя карта?"),
    ("Greek", "Πού είναι η κάρτα μου;"),
    ("Arabic", "أين بطاقتي؟"),
    ("Hebrew", "איפה הכרטיס שלי?"),
    ("Devanagari", "मेरा कार्ड कहाँ है?"),
    ("Japanese", "私の新しいカードはどこですか"),
    ("Chinese", "我的新卡在哪里?"),
    ("Korean", "제 카드는 어디에 있나요?"),
    ("Thai", "บัตรของฉันอยู่ที่ไหน"),
]


@pytest.mark.parametrize(("name", "text"), SENTENCES)
def test_languages_are_told_apart(name, text):
    assert language(text) == name


@pytest.mark.parametrize(
    "text", ["", "OK", "card_arrival", "#### 48", "x = [i for i in range(9)]", "Anna Müller", "🙂🙂", "我"]
)
def test_what_is_too_little_to_tell_has_no_language(text):
    assert language(text) is None


def test_the_word_as_again_and_again_is_not_portuguese():
    assert language("Sue made as many as Mari, as many as Kendra, as many as Ann") != "Portuguese"


def test_a_foreign_word_does_not_change_the_language():
    assert language("What does the Japanese word 猫 mean, and how do you write it?") == "English"


def test_languages_are_those_of_most_english_questions(shared):
    import csv

    with (shared / "datasets/banking77/train.csv").open(newline="", encoding="utf-8") as file:
        found = [language(row["text"]) for row in csv.DictReader(file)]
    assert set(found) == {"English", None}
    assert found.count("English") > 0.8 * len(found)
