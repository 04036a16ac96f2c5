"""
Chat templates of strangers, rendered in a second process with limits on time and memory.

A chat template is a program that comes with a model, written in Jinja. Jinja's sandbox keeps the program away from
files and from Python. It does not keep the program from running for ever, or from filling the memory. A second process
can be stopped, so `render` starts `python data/template.py` once and asks it: one line of JSON for many texts, as a
question and its answer take as long as twenty texts.
"""

import atexit, contextlib, datetime, faulthandler, functools, json, os, signal, subprocess, sys
import threading

SECONDS = 5  # for TEXTS of them; real templates take less than a millisecond for one
TEXTS = 100
MEMORY = 512 << 20  # bytes of address space of the second process (Linux; other systems have no such limit)
LIMITS = f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MB; take another template"


@functools.cache
def compiled(template):
    """The Jinja template in the environment that transformers gives to chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):  # {% generation %} marks the words of the assistant; it adds nothing to the text
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
    env.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class: its methods change things
    return env.from_string(template)


def answer(template, names, each=lambda i: None):
    """{"texts": ...}, or {"error": the reason}: a stranger's program can fail in any way. each(i) comes before text i."""
    try:
        texts = []
        for i, values in enumerate(names):
            each(i)
            texts.append(compiled(template).render(values))
        return {"texts": texts}
    except MemoryError:
        return {"error": LIMITS}
    except Exception as e:
        return {"error": " ".join(str(e).split())[:300] or type(e).__name__}


def serve():
    """Answers requests until standard input ends. A text that takes too long ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        seconds, template, names = json.loads(line)

        def watch(i):
            if i % TEXTS == 0:
                faulthandler.dump_traceback_later(seconds, exit=True)  # a thread in C: Python cannot hold it up
        try:
            reply = json.dumps(answer(template, names, watch))
        except MemoryError:
            reply = json.dumps({"error": LIMITS})
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


class Second:
    """The second process of this one, started when it is first asked, and again after it ended."""

    def __init__(self):
        self.process, self.owner, self.lock = None, None, threading.Lock()

    def ask(self, request):
        """The answer to a request, both bytes without a newline; b"" if the process ended over it."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():  # a fork must not share the pipes
                self.process, self.owner = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL), os.getpid()
            reply = b""
            try:
                with contextlib.suppress(OSError):
                    self.process.stdin.write(request + b"\n")
                    self.process.stdin.flush()
                    reply = self.process.stdout.readline()
            finally:
                if not reply:  # it ended, or Ctrl-C came in between and the answer would be taken for the next one's
                    self.stop()
            return reply

    def stop(self):
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            with contextlib.suppress(OSError):
                self.process.communicate()
        self.process = None


second = Second()
atexit.register(second.stop)


def render(template, names, trusted=False):
    """The texts that a template makes of each dict in `names`; a trusted template runs in this process.

    Raises ValueError with the reason if the template fails.
    """
    if trusted:
        reply = answer(template, names)
    else:
        line = second.ask(json.dumps([SECONDS, template, names]).encode("ascii"))
        reply = json.loads(line) if line else {"error": LIMITS}
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["texts"]


if __name__ == "__main__":
    serve()
