"""Every text that an agent, a client or a model can choose, shown on every page: nothing of it runs, nothing breaks."""

from fakes.browser import NARROW, WIDE, Visit, Visitor
from fakes.world import Living, World

TEXTS = {
    "picture": "<img src=x onerror=alert(1)>",
    "script": '"><script>alert(2)</script>',
    "attribute": "' onfocus=alert(3) autofocus x='",
    "address": "javascript:alert(4)",
    "style": "</style></title></textarea><style>*{display:none}</style>",
    "entity": "&lt;b&gt;&#x3c;img src=x onerror=alert(5)>",
    "template": "{{7*7}} ${alert(6)} #{7*7}",
    "right to left": "\u202egpj.exe",
    "long": "W" * 280,
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 24,
    "nul": "a\0b\x1b[31m",
    "lines": "first\n\n\n\tsecond\u2028third",
    "combining": "Z" + "\u0301" * 120,
}
# What only markup would have made; our own pages have none of these in what they show.
_MADE = """() => [...document.querySelectorAll("main *, dialog *")].filter((e) =>
  ["IMG", "SCRIPT", "IFRAME", "STYLE", "OBJECT", "EMBED", "LINK", "META", "BASE", "FORM"].includes(e.tagName) &&
    !(e.tagName === "FORM" && e.querySelector("button"))
  || [...e.attributes].some((a) => a.name.startsWith("on")
    || ["href", "src", "action", "formaction"].includes(a.name) && /^\\s*javascript:/i.test(a.value))
).map((e) => e.outerHTML.slice(0, 200))"""


def agent_of(world: World, text: str) -> Living:
    """One that says it everywhere where an agent may say something."""
    hardware = {
        "accelerator": text,
        "tier": text,
        "devices": [{"name": text, "memory": text, "driver": text}],
        "cpu": {"model": text},
        "os": text,
    }
    agent = world.agent(text, hardware=hardware)
    agent.says = {
        "health": [{"code": text, "text": text, "since": 1.0}],
        "progress": {"stage": "engine", "done": 30, "total": 100, "rate": 10.0, "text": text},
        "phase": "starting",
        "capacity": 0,
    }
    return agent


def wrong_on(visitor: Visitor, route: str) -> list[str]:
    visitor.go(route)
    wrong = []
    for width in (WIDE, NARROW):
        visitor.look(width)
        visitor.picture(f"hostile-{route.replace('/', '-')}-{width}")
        made: list[str] = visitor.page.evaluate(_MADE)
        wrong += [f"{route} at {width}: {what}" for what in (*made, *visitor.overflow())]
    return wrong


def test_texts_of_agents_and_operators_stay_texts(world: World, visit: Visit) -> None:
    agents = [agent_of(world, text) for text in TEXTS.values()]
    for text in TEXTS.values():
        world.publish(text, text, assigned=False)
        world.join_key(project=text)
        world.api_key(text)
    visitor = visit()
    routes = ["agents", *(f"agents/{agent.id}" for agent in agents), "join", "models", "keys", "try"]
    assert not [wrong for route in routes for wrong in wrong_on(visitor, route)]
    visitor.go("agents")
    seen = visitor.text
    for kind in ("picture", "script", "attribute", "address", "style", "entity", "template"):
        assert TEXTS[kind] in seen
    assert "\u202e" not in seen


def test_answers_of_a_model_and_questions_stay_texts(world: World, visit: Visit) -> None:
    world.publish("toy")
    world.agent().texts = [f"{text}\n" for text in TEXTS.values()]
    visitor = visit()
    answer = visitor.ask(" ".join(TEXTS.values()), "toy")
    for kind in ("picture", "script", "attribute", "address", "style", "entity", "template", "long"):
        assert TEXTS[kind] in answer
    for width in (WIDE, NARROW):
        visitor.look(width)
        assert not visitor.page.evaluate(_MADE)
        assert not visitor.overflow()
