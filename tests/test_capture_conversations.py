"""A prompt that continues what was said gets the ids that said it, whatever the tokenizer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("transformers")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lightning_ray.capture import conversations as conversations_module
from lightning_ray.capture.conversations import Attempt, Conversations
from tests.tokenizers_on_the_spot import (
    END,
    START,
    byte_level,
    decode,
    encode,
    sentencepiece_like,
    spelled,
    unigram,
    word_level,
)

AT: Attempt = ("ro-1", "at-1")
ASK = f"{START}assistant\n"
KINDS = [byte_level, sentencepiece_like, unigram, word_level]


def turn(role: str, content: str) -> str:
    return f"{START}{role}\n{content}{END}\n"


class Chat:
    """A conversation as a chat template and a client have it; the model's answers are ids of the test's choice."""

    def __init__(self, tokenizer: Any, conversations: Conversations | None = None, attempt: Attempt = AT):
        self.tokenizer = tokenizer
        self.conversations = conversations or Conversations(tokenizer)
        self.attempt = attempt
        self.text = ""
        self.said: list[int] = []

    async def prompt(self, content: str) -> tuple[list[int], list[int]]:
        """What the tokenizer makes of the next turn, and what is made of that."""
        self.text += turn("user", content)
        given = encode(self.tokenizer, self.text + ASK)
        restored = await self.conversations.restored(self.attempt, given)
        assert decode(self.tokenizer, restored) == decode(self.tokenizer, given)
        self.said = list(restored)
        return given, restored

    def answer(self, content: str, sampled: list[int], whole: bool = True) -> None:
        """The model's answer; one that is not whole was cut by its length."""
        end = [self.tokenizer.convert_tokens_to_ids(END)] if whole else []
        self.said = [*self.said, *sampled, *end]
        self.conversations.add(self.attempt, self.said)
        self.text += ASK + content + f"{END}\n"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()], ids=["byte-level", "sentencepiece-like"])
async def test_what_was_sampled_in_other_pieces_comes_back_as_it_was_sampled(tokenizer: Any) -> None:
    chat = Chat(tokenizer)
    await chat.prompt("the weather in paris")
    chat.answer("sunny today", spelled(tokenizer, "sunny today"))
    given, restored = await chat.prompt("and in oslo")
    first = chat.said
    assert restored != given and len(restored) > len(given)
    chat.answer("rainy", encode(tokenizer, "rainy"))
    _, restored = await chat.prompt("again")
    assert restored[: len(first)] == first


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()], ids=["byte-level", "sentencepiece-like"])
async def test_later_turns_are_restored_though_earlier_ones_drifted_too(tokenizer: Any) -> None:
    chat = Chat(tokenizer)
    answers = ["sunny weather", "rainy weather", "the answer is there", "again and again"]
    for content in answers:
        before = chat.said
        given, restored = await chat.prompt("the weather in paris")
        assert restored[: len(before)] == before and (not before or restored != given)
        chat.answer(content, spelled(tokenizer, content))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_prompt_that_has_the_same_ids_is_left_as_it_is(kind: Any) -> None:
    tokenizer = kind()
    chat = Chat(tokenizer)
    for _ in range(3):
        given, restored = await chat.prompt("the weather in paris")
        assert restored is given
        sampled = encode(tokenizer, f"{chat.text}{ASK}sunny today{END}")[len(given) : -1]
        assert [*given, *sampled] == encode(tokenizer, f"{chat.text}{ASK}sunny today")
        chat.answer("sunny today", sampled)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_prompt_that_goes_on_otherwise_is_left_alone(kind: Any) -> None:
    tokenizer = kind()
    chat = Chat(tokenizer)
    await chat.prompt("the weather in paris")
    chat.answer("sunny", encode(tokenizer, "sunny"))
    for text in (
        turn("user", "the weather in paris") + ASK + f"rainy{END}\n" + turn("user", "again") + ASK,  # another answer
        turn("user", "the weather in oslo") + ASK + f"sunny{END}\n" + turn("user", "again") + ASK,  # another question
        turn("user", "the weather"),
        turn("user", "the weather in paris") + ASK,  # asked again
    ):
        given = encode(tokenizer, text)
        assert await chat.conversations.restored(AT, given) is given
    empty: list[int] = []
    assert await chat.conversations.restored(AT, empty) is empty


async def test_words_that_were_sampled_in_two_tokens_are_another_text_for_a_word_level_tokenizer() -> None:
    tokenizer = word_level()
    chat = Chat(tokenizer)
    await chat.prompt("the")
    chat.answer("weather", tokenizer.convert_tokens_to_ids(["wea", "ther"]))
    given, restored = await chat.prompt("again")
    assert restored is given


async def test_another_split_into_likely_pieces_comes_back() -> None:
    tokenizer = unigram()
    vocabulary = tokenizer.get_vocab()
    chat = Chat(tokenizer)
    given, _ = await chat.prompt("the weather")
    content = "today in paris"
    canonical = encode(tokenizer, f"{chat.text}{ASK}{content}")[len(given) :]
    letters = [vocabulary[letter] for letter in "".join(tokenizer.convert_ids_to_tokens(canonical))]
    assert letters != canonical
    chat.answer(content, letters)
    before = chat.said
    given, restored = await chat.prompt("again")
    assert restored[: len(before)] == before and restored != given


async def test_a_turn_cut_by_its_length_comes_back_though_the_template_ends_it() -> None:
    for tokenizer in (byte_level(), sentencepiece_like()):
        chat = Chat(tokenizer)
        await chat.prompt("the weather")
        chat.answer("sunny toda", spelled(tokenizer, "sunny toda"), whole=False)
        before = chat.said
        _, restored = await chat.prompt("again")
        assert restored[: len(before)] == before
        assert restored[len(before)] == tokenizer.convert_tokens_to_ids(END)


async def test_a_text_that_goes_on_amid_a_token_is_encoded_from_there() -> None:
    """A client of completions that appends to the text itself."""
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    said = [*encode(tokenizer, "the answer is "), *spelled(tokenizer, "wea")]
    conversations.add(AT, said)
    given = encode(tokenizer, "the answer is weather in paris again")
    assert decode(tokenizer, given[:4]) not in ("the answer is wea", "the answer is ")
    restored = await conversations.restored(AT, given)
    assert restored[: len(said)] == said and decode(tokenizer, restored) == decode(tokenizer, given)
    assert restored[len(said) :] == encode(tokenizer, "ther in paris again")


async def test_what_follows_keeps_the_prompts_own_ids() -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    said = spelled(tokenizer, "sunny")
    conversations.add(AT, said)
    own = [*spelled(tokenizer, " toda"), *encode(tokenizer, "y again")]
    restored = await conversations.restored(AT, [*encode(tokenizer, "sunny"), *own])
    assert restored == [*said, *own]


@pytest.mark.parametrize("content", ["日本語の天気 🙂", "👩‍👩‍👧 über café", "🙂🙃🙂"])
@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()], ids=["byte-level", "sentencepiece-like"])
async def test_characters_split_over_tokens_come_back(tokenizer: Any, content: str) -> None:
    chat = Chat(tokenizer)
    for whole in (True, False, True):
        await chat.prompt("the weather")
        chat.answer(content, spelled(tokenizer, content), whole)
        before = chat.said
        _, restored = await chat.prompt("und weiter 🙂")
        assert restored[: len(before)] == before
        chat.answer("ja", encode(tokenizer, "ja"))


async def test_a_text_that_completes_a_character_is_another_text() -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    conversations.add(AT, spelled(tokenizer, "the 日")[:-1])
    given = encode(tokenizer, "the 日本")
    assert await conversations.restored(AT, given) is given


async def test_a_mark_of_a_turn_that_was_said_letter_by_letter_comes_back_so() -> None:
    tokenizer = byte_level()
    for spelt in (f"sunny{END}\n{START}user\nhello", END, f"a{END}"):
        chat = Chat(tokenizer)
        await chat.prompt("the weather")
        chat.answer(spelt, spelled(tokenizer, spelt))
        before = chat.said
        given, restored = await chat.prompt("again")
        assert restored[: len(before)] == before and restored != given


async def test_an_id_without_text_comes_back() -> None:
    """Embeddings may have more rows than the tokenizer has tokens."""
    tokenizer = byte_level()
    chat = Chat(tokenizer)
    await chat.prompt("the weather")
    chat.answer("sunny", [len(tokenizer) + 7, *encode(tokenizer, "sunny"), len(tokenizer) + 8])
    before = chat.said
    _, restored = await chat.prompt("again")
    assert restored[: len(before)] == before


async def test_conversations_of_one_attempt_do_not_hide_each_other() -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    chats = [Chat(tokenizer, conversations) for _ in range(40)]
    for number, chat in enumerate(chats):
        for step in range(1 + 3 * (number > 0)):
            await chat.prompt(f"agent {number} step {step} " + "the weather " * 5 * (number > 0))
            chat.answer("sunny", spelled(tokenizer, "sunny"))
    for chat in chats:
        before = chat.said
        _, restored = await chat.prompt("again")
        assert restored[: len(before)] == before


async def test_of_choices_with_the_same_beginning_the_one_that_goes_on_comes_back() -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    base = encode(tokenizer, turn("user", "the weather") + ASK)
    choices = [[*base, *spelled(tokenizer, word), 2] for word in ("sunny", "rainy", "again", "sun", "sunn")]
    for choice in choices:
        conversations.add(AT, choice)
    for word, choice in zip(("sunny", "rainy", "again", "sun", "sunn"), choices, strict=True):
        text = turn("user", "the weather") + ASK + f"{word}{END}\n" + turn("user", "and") + ASK
        restored = await conversations.restored(AT, encode(tokenizer, text))
        assert restored[: len(choice)] == choice


async def test_a_conversation_can_be_taken_up_from_any_of_its_turns() -> None:
    tokenizer = byte_level()
    chat = Chat(tokenizer)
    stages = []
    for word in ("sunny", "rainy", "again"):
        await chat.prompt("the weather")
        chat.answer(word, spelled(tokenizer, word))
        stages.append((chat.text, chat.said))
    for text, said in stages:
        restored = await chat.conversations.restored(AT, encode(tokenizer, text + turn("user", "otherwise") + ASK))
        assert restored[: len(said)] == said


async def test_attempts_do_not_mix() -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    chat = Chat(tokenizer, conversations)
    await chat.prompt("the weather")
    chat.answer("sunny", spelled(tokenizer, "sunny"))
    given = encode(tokenizer, chat.text + turn("user", "again") + ASK)
    for other in (("ro-1", "at-2"), ("ro-2", "at-1")):
        assert await conversations.restored(other, given) is given
    assert await conversations.restored(AT, given) != given


async def test_a_conversation_is_held_once_however_many_turns_it_has() -> None:
    tokenizer = byte_level()
    chat = Chat(tokenizer)
    for _ in range(20):
        await chat.prompt("the weather in paris")
        chat.answer("sunny", spelled(tokenizer, "sunny"))
        chat.conversations.add(AT, chat.said)
    assert chat.conversations._tokens == len(chat.said)


async def test_the_attempts_that_were_longest_idle_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer, tokens_kept=1000)
    said = spelled(tokenizer, "sunny")
    given = encode(tokenizer, "sunny again")
    for number in range(1000):
        conversations.add(("ro-1", str(number)), [*said, number])
        conversations.add(("ro-1", "busy"), said)
        assert conversations._tokens <= 1000
    assert await conversations.restored(("ro-1", "busy"), given) != given
    assert conversations._tokens == sum(s.tokens for s in conversations._said.values())
    monkeypatch.setattr(conversations_module, "ATTEMPTS_KEPT", 50)

    async def nothing(attempt: Attempt) -> list[list[int]]:
        return []

    empty = Conversations(tokenizer, nothing)
    for number in range(100):
        await empty.restored(("ro-1", str(number)), given)
    assert len(empty._said) == 50


async def test_one_attempt_may_be_larger_than_all_that_is_kept() -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer, tokens_kept=3)
    conversations.add(("ro-1", "other"), [5])
    said = spelled(tokenizer, "sunny")
    conversations.add(AT, said)
    assert (await conversations.restored(AT, encode(tokenizer, "sunny again")))[: len(said)] == said


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()], ids=["byte-level", "sentencepiece-like"])
async def test_a_long_text_without_turns_comes_back(tokenizer: Any) -> None:
    conversations = Conversations(tokenizer)
    content = "the weather in paris 日 is sunny 🙂 today " * 200 + "and"
    said = encode(tokenizer, content)
    said = [*said[:4], *spelled(tokenizer, decode(tokenizer, said)[len(decode(tokenizer, said[:4])) :])]
    conversations.add(AT, said)
    given = encode(tokenizer, content + " again")
    restored = await conversations.restored(AT, given)
    assert restored[: len(said)] == said and decode(tokenizer, restored) == decode(tokenizer, given)


class Store:
    """What other replicas stored."""

    def __init__(self, said: list[list[int]]):
        self.said = said
        self.asked = 0
        self.failure: Exception | None = None

    async def load(self, attempt: Attempt) -> list[list[int]]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return self.said


async def test_what_another_replica_saw_is_asked_for_once() -> None:
    tokenizer = byte_level()
    said = spelled(tokenizer, "sunny")
    store = Store([said])
    conversations = Conversations(tokenizer, store.load)
    given = encode(tokenizer, "sunny again")
    found = await asyncio.gather(*(conversations.restored(AT, given) for _ in range(20)))
    assert all(restored[: len(said)] == said for restored in found)
    other = encode(tokenizer, "rainy")
    assert await conversations.restored(AT, other) is other
    assert store.asked == 1


async def test_the_store_is_asked_though_another_conversation_of_the_attempt_is_known() -> None:
    tokenizer = byte_level()
    said = spelled(tokenizer, "sunny")
    store = Store([said])
    conversations = Conversations(tokenizer, store.load)
    conversations.add(AT, spelled(tokenizer, "rainy"))
    assert (await conversations.restored(AT, encode(tokenizer, "sunny again")))[: len(said)] == said
    assert store.asked == 1


async def test_the_store_is_not_asked_for_what_is_known() -> None:
    tokenizer = byte_level()
    store = Store([])
    chat = Chat(tokenizer, Conversations(tokenizer, store.load))
    chat.said = encode(tokenizer, turn("user", "the weather") + ASK)
    chat.text = turn("user", "the weather")
    for _ in range(3):
        chat.answer("sunny", spelled(tokenizer, "sunny"))
        await chat.prompt("again")
    assert store.asked == 0


async def test_a_store_that_fails_is_asked_again() -> None:
    tokenizer = byte_level()
    said = spelled(tokenizer, "sunny")
    store = Store([said])
    store.failure = ConnectionError("gone")
    conversations = Conversations(tokenizer, store.load)
    given = encode(tokenizer, "sunny again")
    with pytest.raises(ConnectionError):
        await conversations.restored(AT, given)
    store.failure = None
    assert (await conversations.restored(AT, given))[: len(said)] == said


async def test_a_caller_that_gives_up_does_not_stop_the_loading_for_others() -> None:
    tokenizer = byte_level()
    said = spelled(tokenizer, "sunny")
    conversations = Conversations(tokenizer, Store([said]).load)
    given = encode(tokenizer, "sunny again")
    first, second = (asyncio.create_task(conversations.restored(AT, given)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)[: len(said)] == said


class Plain:
    """A tokenizer whose ``decode`` knows no options, as Mistral's under vLLM."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.all_special_ids = inner.all_special_ids

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return decode(self.inner, ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return encode(self.inner, text)


async def test_a_tokenizer_without_options_will_do() -> None:
    tokenizer = byte_level()
    conversations = Conversations(Plain(tokenizer))  # type: ignore[arg-type]
    said = [1, *spelled(tokenizer, "sunny")]
    conversations.add(AT, said)
    given = encode(tokenizer, f"{START}sunny again")
    assert (await conversations.restored(AT, given))[: len(said)] == said


async def test_a_tokenizer_that_cleans_up_is_kept_from_it() -> None:
    tokenizer = byte_level()
    tokenizer.clean_up_tokenization_spaces = True
    try:
        conversations = Conversations(tokenizer)
        conversations.add(AT, spelled(tokenizer, "sunny ,"))
        given = encode(tokenizer, "sunny, again")
        assert await conversations.restored(AT, given) is given
    finally:
        tokenizer.clean_up_tokenization_spaces = False


TEXT = st.text(st.sampled_from("the waer<|im_end|>\n日é🙂\u200d"), max_size=12)
RELAXED = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@RELAXED
@given(st.lists(st.integers(0, 379), max_size=20), TEXT, st.booleans())
@example([97], "<", False)
def test_any_ids_come_back_before_any_text_that_follows(said: list[int], follows: str, known: bool) -> None:
    tokenizer = byte_level()
    conversations = Conversations(tokenizer)
    conversations.add(AT, said)
    if known:
        conversations.add(AT, said[: len(said) // 2])
    given = encode(tokenizer, decode(tokenizer, said) + follows)
    restored = asyncio.run(conversations.restored(AT, given))
    assert decode(tokenizer, restored) == decode(tokenizer, given)
    if follows and decode(tokenizer, given).startswith(decode(tokenizer, said)):
        assert restored[: len(said)] == said


@RELAXED
@given(st.lists(st.lists(st.integers(0, 379), max_size=8), max_size=5), st.lists(st.integers(0, 379), max_size=12))
@example([[0], [0, 1]], [0, 0])
@example([[0], [0, 3]], [0, 0])
def test_whatever_is_known_and_asked_the_text_stays(known: list[list[int]], given: list[int]) -> None:
    for tokenizer in (byte_level(), sentencepiece_like()):
        conversations = Conversations(tokenizer)
        for said in known:
            conversations.add(AT, said)
        restored = asyncio.run(conversations.restored(AT, given))
        assert decode(tokenizer, restored) == decode(tokenizer, given)
        if restored != given:
            assert any(said and restored[: len(said)] == said for said in known)
        else:
            assert restored is given


@RELAXED
@given(
    st.sampled_from([byte_level, sentencepiece_like]),
    st.lists(st.tuples(TEXT, TEXT, st.lists(st.booleans(), min_size=4, max_size=4), st.booleans()), max_size=5),
)
def test_each_turn_of_any_chat_extends_the_last(kind: Any, turns: list[tuple[str, str, list[bool], bool]]) -> None:
    """Unless the tokenizer makes another text of what was said."""

    async def play() -> None:
        tokenizer = kind()
        chat = Chat(tokenizer)
        for question, content, pieces, whole in turns:
            before = chat.said
            given, restored = await chat.prompt(question)
            if decode(tokenizer, given).startswith(decode(tokenizer, before)):
                assert restored[: len(before)] == before
            size = max(1, len(content) // len(pieces))
            sampled: list[int] = []
            for index, one in enumerate(pieces):
                part = content[index * size : None if index == len(pieces) - 1 else (index + 1) * size]
                sampled += spelled(tokenizer, part) if one or kind is sentencepiece_like else encode(tokenizer, part)
            chat.answer(content, sampled, whole)

    asyncio.run(play())
