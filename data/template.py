"""
Chat templates: ours, and those of strangers, rendered in a second process with limits.

A chat template is a program in Jinja that comes with a model. Jinja's sandbox keeps the program
away from files and from Python, but cannot stop an endless loop or limit the memory. A process can
be stopped, so `render` starts `python data/template.py` once and sends it requests: one line of
JSON for many texts, because a request and its reply take as long as twenty texts.
"""

import atexit, contextlib, datetime, faulthandler, functools, json, os, re, signal, subprocess, sys
import threading

# Trainers learn the text between the generation marks: the assistant's words and the end token.
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
          "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# For tokenizers without chat tokens. No space ends the prompt: " The" is one token.
PLAIN = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Assistant:' }}{% generation %}"
         "{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
         "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
         "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")

SECONDS = 5  # for TEXTS texts; real templates take less than a millisecond for one
TEXTS = 100
REQUEST = 1 << 20  # characters of messages in one request: a request has its own time limit
MEMORY = 512 << 20  # bytes of address space of the second process (Linux; other systems have no such limit)
OTHER = "give the model a template for plain text, as chat_template in tokenizer_config.json or as chat_template.jinja"
LIMITS = f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB; take another template"


@functools.cache
def compiled(template):
    """The Jinja template in the environment that transformers gives to chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # {% generation %} marks the words of the assistant and adds no text
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise ValueError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    env.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class: its methods can change objects
    return env.from_string(template)


def answer(template, variables, before=lambda i: None):
    """Renders a template with each dict of `variables`: {"texts": [...]}, or {"error": reason}.

    before(i) is called before text i.
    """
    try:
        texts = []
        for i, values in enumerate(variables):
            before(i)
            texts.append(compiled(template).render(values))
        return {"texts": texts}
    except MemoryError:
        return {"error": LIMITS}
    except Exception as e:  # a stranger's program can fail in any way
        return {"error": " ".join(str(e).split())[:300] or type(e).__name__}


def serve():
    """Answers requests until standard input ends. A text that takes too long ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        seconds, template, variables = json.loads(line)

        def watch(i):
            if i % TEXTS == 0:
                faulthandler.dump_traceback_later(seconds, exit=True)  # a thread in C, which Python cannot delay
        try:
            reply = json.dumps(answer(template, variables, watch))
        except MemoryError:
            reply = json.dumps({"error": LIMITS})
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


class Second:
    """The second process, started at the first request, and again after an end."""

    def __init__(self):
        self.process, self.owner, self.lock = None, None, threading.Lock()

    def ask(self, request):
        """The reply to a request, both bytes without newlines; b"" if the process ended."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():  # a fork must not share the pipes
                self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                self.owner = os.getpid()
            reply = b""
            try:
                with contextlib.suppress(OSError):
                    self.process.stdin.write(request + b"\n")
                    self.process.stdin.flush()
                    reply = self.process.stdout.readline()
            finally:
                if not reply:  # after Ctrl-C too, or the next request would get this reply
                    self.stop()
            return reply

    def stop(self):
        """Ends the process, if this process started it."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()
        self.process = None


second = Second()
atexit.register(second.stop)


def render(template, variables):
    """Renders a template once for each dict in `variables`. Returns a list of str.

    Our own templates run in this process. Raises ValueError with the reason if the template fails.
    """
    if template in (CHATML, PLAIN):
        reply = answer(template, variables)
    else:
        line = second.ask(json.dumps([SECONDS, template, variables]).encode("ascii"))
        reply = json.loads(line) if line else {"error": LIMITS}
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["texts"]


def requests(chats):
    """Yields chats (messages, ...) in lists of about REQUEST characters.

    A conversation of n turns is rendered up to each turn: n / 2 times the text in the mean.
    """
    some, size = [], 0
    for chat in chats:
        some.append(chat)
        size += sum(len(m["content"]) for m in chat[0] if isinstance(m.get("content"), str))
        if size > REQUEST:
            yield some
            some, size = [], 0
    if some:
        yield some


def fresh(messages):
    """The messages that a rendered text must show: the system's, and all since the answer before."""
    start = max(0, len(messages) - 1)
    while start and messages[start - 1].get("role") != "assistant":
        start -= 1
    return [m for m in messages[:min(1, start)] if m.get("role") == "system"] + messages[start:]


def way_out(chats):
    """A clause for messages: how to change `chats` whose roles a template may not take."""
    roles = [[message.get("role") for message in messages] for messages, _ in chats]
    if any("system" in some for some in roles):
        return "; if it takes no system message, put that text at the beginning of the first question"
    if any(a == b for some in roles for a, b in zip(some, some[1:])):
        return "; if it wants user and assistant in turn, join neighbouring messages of one role"
    return ""


def shows(text, content):
    """Whether a text holds a message's content, as JSON or without spaces, marks and case."""
    squeeze = lambda x: re.sub(r"[\W_]+", "", x).casefold()
    return (content.strip() in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
            or squeeze(content) != "" and squeeze(content) in squeeze(text))


if __name__ == "__main__":
    serve()
