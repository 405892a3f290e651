"""
Letters of words, generated: models read tokens, not letters, so spelling and counting letters must be taught.

SimpleSpelling: "Spell packet." -> "p a c k e t".
SpellingBee:    "How many e are in settlement?" -> the word spelt out, then the calculator on 'settlement'.count('e'), then
the number. Spelling first turns one opaque token into letters; the tool checks the count (the idea, and the tool's `.count`,
are nanochat's).
"""

from tasks.common import GeneratedTask, dialogue, final_text, same_words
from tasks.words import SPELL

SPELL_ASK = ("Spell {}.", "How do you spell {}?", "Spell the word {}.", "spell {}")
COUNT_ASK = ("How many {letter} are in {word}?", "How many {letter} are there in the word {word}?",
             "Count the letter {letter} in {word}.", "how many {letter} in {word}", "How often is {letter} in '{word}'?",
             "How many times does {word} have the letter {letter}?", "In {word}, how many {letter} are there?",
             "{word}: how many {letter}?")


class SimpleSpelling(GeneratedTask):
    name = "spelling"

    def __init__(self, words=SPELL, **kwargs):
        super().__init__(**kwargs)
        self.words = words

    def example(self, index):
        rng = self.rng(index)
        word = rng.choice(self.words)
        return {"messages": dialogue(rng.choice(SPELL_ASK).format(word), spelt(word)), "answer": spelt(word)}


class SpellingBee(GeneratedTask):
    name = "spellingbee"

    def __init__(self, words=SPELL, **kwargs):
        super().__init__(**kwargs)
        self.words = words

    def example(self, index):
        rng = self.rng(index)
        word = rng.choice(self.words)
        # nine in ten ask for a letter of the word: most letters are in no given word, and zero would always be a good guess
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        answer = str(word.count(letter))
        content = [{"type": "text", "text": f"{word}: {spelt(word)}\n"},
                   {"type": "python", "text": f"'{word}'.count('{letter}')"},
                   {"type": "python_output", "text": answer},
                   {"type": "text", "text": answer}]
        question = rng.choice(COUNT_ASK).format(letter=letter, word=word)
        return {"messages": dialogue(question, content), "answer": answer}

    def evaluate(self, conversation, answer_text):
        """The last line counts: without the tool the number may follow the spelling directly."""
        lines = final_text(answer_text).splitlines()
        return bool(lines) and same_words(lines[-1], conversation["answer"])


def spelt(word):
    return " ".join(word)
