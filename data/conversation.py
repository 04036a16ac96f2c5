"""
Records as conversations: which fields hold the messages, the prompt and the response, or a text.

    messages, how = of_record(place, {"question": "What is 2 + 2?", "answer": "4."})
    # [{"role": "user", ...}, {"role": "assistant", ...}], "examples from the fields question -> answer"

Messages are those of the Hub: a list of {"role": "system", "user" or "assistant", "content": str}.
"""
from typing import NamedTuple

from data import UserError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
CHATS = ("messages", "conversations", "conversation")  # lists of turns: of OpenAI and the Hub, ShareGPT, LMSYS
PROMPTS = ("prompt", "question", "instruction")
RESPONSES = ("response", "completion", "answer", "output")
SYSTEMS, INPUTS = ("system", "system_prompt"), ("input", "context")  # INPUTS follow an instruction (Alpaca, Dolly)
LEAVE = "or leave out such conversations"


class Names(NamedTuple):
    """Names of fields that a person gave; None: the usual names."""
    text: str = None
    prompt: str = None
    response: str = None


def field(fields, options, kind=str):
    """The record's own name of the first of `options` that has a value of this type; or None.

    Names are compared without case.
    """
    own = {key.lower(): key for key in fields} | {key: key for key in fields}
    return next((own[name] for name in options if isinstance(fields.get(own.get(name)), kind)), None)


def of_record(place, fields, names=Names()):
    """(messages, the shape in words) of a record, a dict; None if it is no conversation.

    A record with the fields of `names` is one turn; beside such records there may be conversations.
    A conversation ends with the last turn of the assistant: nothing later can be learned. Without
    such a turn there is none in the messages. An opening turn of the assistant is left out, because
    no chat begins with it. Raises UserError, naming the place, for a turn that is not text.
    """
    one_turn = prompt_and_response(fields, names)
    chat = None if names.text or any(names) and one_turn else field(fields, CHATS, list)
    if chat is not None:
        messages, shape = [message(place, turn) for turn in fields[chat]], f"conversations from {chat}"
    elif one_turn:
        messages, shape = one_turn
    else:
        return None
    if (system := field(fields, SYSTEMS)) and fields[system].strip() and not any(
            m["role"] == "system" for m in messages):
        messages = [{"role": "system", "content": clean(fields[system])}, *messages]
        shape += f", with {system}"
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
    opening = [m for m in messages[:first] if m["role"] == "system"]
    if len(opening) < first < len(messages):
        shape += ", without the opening turn of the assistant"
    return opening + messages[first:max(answers(messages), default=-1) + 1], shape


def prompt_and_response(fields, names):
    """(messages of one turn, the shape in words) of a record; None if it has no such fields."""
    if names.text and not (names.prompt or names.response):
        return None
    prompt = field(fields, (names.prompt,) if names.prompt else PROMPTS)
    response = field(fields, (names.response,) if names.response else RESPONSES)
    if prompt is None or response is None:
        return None
    question, more = fields[prompt], field(fields, INPUTS) if prompt.lower() == "instruction" else None
    if more and fields[more].strip():
        question = f"{question}\n\n{fields[more]}"
    return ([*asked(clean(question)), {"role": "assistant", "content": clean(fields[response])}],
            f"examples from the fields {f'{prompt} + {more}' if more else prompt} -> {response}")


def text_of_record(place, fields, names=Names()):
    """(text, the shape in words) of a record. Raises UserError, naming the fields it has."""
    name = field(fields, (names.text,) if names.text else ("text",)) if names.text or not any(names) else None
    if name is not None:
        return clean(fields[name]), f"texts from the field {name}"
    if names.text:
        wanted = f'the string field "{names.text}"'
    elif any(names):
        wanted = (f'the string fields "{names.prompt or "prompt"}" and "{names.response or "response"}", or the list '
                  '"messages"')
    else:
        wanted = 'the string field "text", or the two "prompt" and "response", or the list "messages"'
    has = ", ".join(f'"{key}"' for key in fields) or "none"
    has = has if len(has) < 200 else f"{has[:196]} ..."
    raise UserError(f"{place}: needs {wanted}; it has {has}: name other fields by --text-field, or by --prompt-field "
                    "and --response-field")


def message(place, turn):
    """{"role", "content"} of a turn, {"role" or "from", "content" or "value"}. Raises UserError."""
    if not isinstance(turn, dict):
        raise UserError(f"{place}: a turn of the conversation is no object with role and content: repair it, {LEAVE}")
    role = turn.get("role") or turn.get("from")
    content = turn["value"] if turn.get("content") is None and "value" in turn else turn.get("content")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UserError(f"{place}: a turn has the role {role!r}, and the roles are system, user (or human) and "
                        f"assistant (or gpt): rename the role, {LEAVE}")
    if any(turn.get(call) for call in ("tool_calls", "function_call")):
        raise UserError(f"{place}: a turn of {role} calls a tool, which is no text to learn: write the call as "
                        f"content, {LEAVE}")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise UserError(f"{place}: a turn of {role} has a part of the type {kind!r}, and only text can be "
                            f"learned: take it out, {LEAVE}")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{place}: a turn of {role} has no text as content: give it a text, {LEAVE}")
    return {"role": ROLES[role.lower()], "content": clean("".join(part["text"] for part in parts))}


def asked(prompt):
    """The messages of a prompt: a question (str), or messages already."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def answers(messages):
    """The places of the assistant's turns in messages: a list of int."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def clean(text):
    """The text with half surrogate pairs, which JSON can spell ("\\ud83d"), as U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
