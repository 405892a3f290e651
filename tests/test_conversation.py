"""Conversations: what the stream is fed over many turns is what the tokenizer renders for all of them at once."""

import random

import pytest
import torch

from nanochat.conversation import Conversation, Piece, Progress, Speech
from nanochat.engine import Engine, PlainStream
from nanochat.tokenizer import Tokenizer
from tests.fakes import ByteTokenizer, ScriptedStream, random_gpt

tokenizer = Tokenizer([bytes([i]) for i in range(256)] + [b"he", b"llo", "€".encode()[:2]])
engine = Engine(tokenizer)
END = tokenizer.special("<|assistant_end|>")


class Answers:
    """A stream that gives a fixed answer after every assistant_start, and remembers all it was given. A prompt is taken in by stretches but for the last."""

    def __init__(self, answer, stretch=10 ** 6):
        self.answer, self.fed, self.feeds, self.length, self.stretch = [*tokenizer.encode(answer), END], [], [], 0, stretch

    def skim(self, ids):
        for done in range(self.stretch, len(ids), self.stretch):
            self.fed += ids[done - self.stretch:done]
            self.length += self.stretch
            yield done

    def feed(self, ids, prompt=True):
        self.fed += ids
        self.feeds.append(list(ids))
        self.length += len(ids)
        start = tokenizer.special("<|assistant_start|>")
        since = self.fed[::-1].index(start) if start in self.fed else 0
        logits = torch.zeros(tokenizer.vocab_size)
        logits[self.answer[min(since, len(self.answer) - 1)]] = 9.0
        return logits


def text_of(pieces):
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece))


@pytest.mark.parametrize("seed", range(20))
def test_turn_by_turn_feeds_what_is_rendered_at_once(seed):
    """With answers cut short, readers that walk away, and prompts that are not all read: the stream's ids are always those of the whole conversation."""
    rng = random.Random(seed)
    stream = Answers("hello €", stretch=rng.choice([10 ** 6, 4, 7]))
    conversation = Conversation(engine, stream)
    messages = []
    for turn in range(4):
        user = "".join(rng.choice("abc €<|bos|>") for _ in range(rng.randrange(20)))
        max_tokens, walk_away = rng.choice([None, 2, 3]), rng.choice([None, None, 1, 2])
        said = []
        for piece in conversation.reply(user, max_tokens, temperature=0):
            if isinstance(piece, Piece):
                said.append(piece)
                if len(said) == walk_away:
                    break
        reply_ids = stream.answer[:-1][:min(len(stream.answer) - 1 if max_tokens is None else max_tokens, walk_away or 99)]
        messages += [(user, reply_ids)]
        expected = tokenizer.render_prompt({"messages": [{"role": "user", "content": messages[0][0]}]})
        for (_, ids), (user, _) in zip(messages, messages[1:]):
            expected += ids + [END] + tokenizer.render_prompt({"messages": [{"role": "user", "content": user}]})[1:]
        now = stream.fed + conversation.waiting
        assert now[:len(expected)] == expected
        assert now[len(expected):] == reply_ids
    conversation.finish()
    assert stream.fed == expected + reply_ids + [END] and not conversation.waiting


def test_whole_answers_give_the_rendered_conversation():
    stream = Answers("hello")
    conversation = Conversation(engine, stream)
    messages = []
    for user in ("one", "two", "<|assistant_end|>"):
        messages += [{"role": "user", "content": user}]
        answer = text_of(conversation.reply(user, temperature=0))
        assert answer == "hello" and conversation.ended == "stop"
        assert stream.fed == tokenizer.render_prompt({"messages": messages}) + tokenizer.encode(answer)
        messages += [{"role": "assistant", "content": answer}]
    assert conversation.turns == 3
    assert max(len(feed) for feed in stream.feeds[1:]) < 30, "an old turn was read again"


def test_a_history_can_be_given_with_the_first_message():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]
    stream = Answers("hello")
    list(Conversation(engine, stream).reply(messages, max_tokens=1))
    assert stream.fed == tokenizer.render_prompt({"messages": messages})


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
                                      [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                                      [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                                       {"role": "user", "content": "c"}]])
def test_what_is_no_question_is_refused_and_changes_nothing(messages):
    conversation = Conversation(engine, Answers("x"))
    with pytest.raises(ValueError, match="message"):
        conversation.reply(messages)
    assert (conversation.turns, conversation.waiting, conversation.unfinished) == (0, [], False)


def test_progress_counts_up_and_what_is_left_is_fed_in_one_go():
    stream = Answers("hello", stretch=10)
    events = list(Conversation(engine, stream).reply("x" * 55, temperature=0))
    assert events[:5] == [Progress(done, 59) for done in (10, 20, 30, 40, 50)]
    assert [len(feed) for feed in stream.feeds[:2]] == [9, 1]
    assert text_of(events) == "hello"


def test_leaving_while_a_long_message_is_read_loses_none_of_it():
    stream = Answers("hello", stretch=10)
    conversation = Conversation(engine, stream)
    for event in conversation.reply("x" * 55):
        break
    assert stream.length == 10
    assert text_of(conversation.reply("and?", temperature=0)) == "hello"
    long = tokenizer.render_prompt({"messages": [{"role": "user", "content": "x" * 55}]})
    assert stream.fed[:len(long) + 1] == long + [END]


def test_only_a_message_is_a_prompt():
    """
    What the calculator forces, and the end of an answer when a conversation is saved, come several tokens at once. A session took them for prompts, and
    searched all of its history for what "<|output_start|>144<|output_end|>" asks.
    """
    special, ids = tokenizer.special, tokenizer.encode
    said = [*ids("so "), special("<|python_start|>"), *ids("12*12"), special("<|python_end|>")]
    forced = [special("<|output_start|>"), *ids("144"), special("<|output_end|>")]
    stream = ScriptedStream(said + forced + ids(" ok") + [END], tokenizer.vocab_size)
    conversation, prompts = Conversation(engine, stream), []
    for message in "how much?", "again?":
        stream.prompt_length = None # the same script for each
        prompts.append(conversation.render([dict(role="user", content=message)]))
        list(conversation.reply(message, len(said + forced) + 1, temperature=0)) # cut off in the middle
        conversation.finish()
        assert stream.feeds[-2:] == [said[-1:] + forced, [*ids(" "), END]]
    assert stream.asked == prompts


def test_a_stream_that_fails_in_the_middle_can_be_asked_again():
    class Fails(Answers):
        def feed(self, ids, prompt=True):
            if self.length > 8 and not self.failed:
                self.failed = True
                raise RuntimeError("out of memory")
            return super().feed(ids)
    stream = Fails("hello €")
    stream.failed = False
    conversation = Conversation(engine, stream)
    with pytest.raises(RuntimeError):
        list(conversation.reply("abc", temperature=0))
    before = stream.fed + conversation.waiting
    list(conversation.reply("d", temperature=0))
    assert stream.fed[:len(before) + 1] == before + [END]


@pytest.mark.parametrize("text", ["plain", "Größe €", "日本語 🎉🎉", "mixed 🎉 and a", ""])
def test_speech_never_shows_half_a_character(text):
    """Streamed answers showed U+FFFD where a character came in several tokens."""
    speech = Speech(ByteTokenizer())
    pieces = [speech.take(token) for token in text.encode()] + [speech.end()]
    assert "".join(piece.text for piece in pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)
    cut = Speech(ByteTokenizer())
    assert text_of([cut.take(token) for token in "é".encode()[:1]] + [cut.end()]) == "\ufffd", "a cut character is shown as one"


def test_speech_tells_the_calculator_from_the_text():
    said = [65, tokenizer.special("<|python_start|>"), 49, 43, 49, tokenizer.special("<|python_end|>"), tokenizer.special("<|output_start|>"), 50,
            tokenizer.special("<|output_end|>"), 66]
    speech = Speech(tokenizer)
    pieces = [piece for piece in map(speech.take, said) if piece.text]
    assert pieces == [("text", "A"), ("python", "1"), ("python", "+"), ("python", "1"), ("output", "2"), ("text", "B")]


def test_a_second_turn_over_a_real_cache_equals_one_long_prompt():
    gpt = random_gpt(seq_len=128, vocab_size=tokenizer.vocab_size)
    stream = PlainStream(gpt)
    conversation = Conversation(engine, stream)
    list(conversation.reply("first", max_tokens=5, temperature=0))
    list(conversation.reply("second", max_tokens=1, temperature=0))
    with torch.no_grad():
        whole = gpt(torch.tensor([stream.kept]))[0, -1]
    again = PlainStream(gpt)
    torch.testing.assert_close(again.feed(stream.kept), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stream.feed([65]), again.feed([65]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("capacity", [512, 40])
def test_rewound_to_a_mark_a_conversation_goes_on_as_it_did(capacity):
    """From a turn that was cut short, so that ids wait; with a stream that slides past its capacity in between, and one that does not."""
    conversation = Conversation(engine, PlainStream(random_gpt(vocab_size=tokenizer.vocab_size, seq_len=512), capacity))
    text_of(conversation.reply("hello", max_tokens=3, temperature=0))
    mark, length = conversation.mark(), conversation.stream.length
    first = text_of(conversation.reply("a €", max_tokens=20, temperature=0))
    text_of(conversation.reply("something else, and longer than that was", max_tokens=20, temperature=0))
    for _ in range(2):
        conversation.rewind(mark)
        assert conversation.stream.length == length
        assert text_of(conversation.reply("a €", max_tokens=20, temperature=0)) == first
