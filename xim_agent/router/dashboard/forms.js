// What forms and lists are made of: labels, errors beside their field, things to copy, rows that stay where they are.
import { api, make, notice, READ_ONLY, canWrite } from "/dashboard/core.js";

let ids = 0;

export const input = (value, most, name = "text") => {
  const box = make("input");
  Object.assign(box, { type: name, value, autocomplete: "off", spellcheck: false });
  if (name === "text") box.maxLength = most;
  return box;
};

// `choices`: [value, text] pairs.
export function select(choices, value) {
  const box = make("select");
  for (const [each, text] of choices) box.append(new Option(text, each, false, each === value));
  return box;
}

// A label with its input, a hint and a place for what is wrong; `name`: of the member in what is sent.
export function field(name, label, control, hint) {
  const box = make("div", null, "field");
  const id = `field-${ids += 1}`;
  const wrong = make("small", "", "bad");
  control.id = id;
  wrong.id = `${id}-wrong`;
  control.setAttribute("aria-describedby", hint ? `${id}-hint ${wrong.id}` : wrong.id);
  box.appendChild(make("label", label)).htmlFor = id;
  box.append(control);
  if (hint) box.appendChild(make("small", hint)).id = `${id}-hint`;
  box.append(wrong);
  return {
    name, box, control,
    tell(text) {
      wrong.textContent = text;
      if (text) control.setAttribute("aria-invalid", "true");
      else control.removeAttribute("aria-invalid");
    },
  };
}

// A form of these fields; `act` sends them. An error stands beside its field, else at the end.
export function form(fields, verb, act) {
  const box = make("form", null, "card");
  const wrong = make("p", "", "bad");
  const button = make("button", verb, "primary");
  wrong.setAttribute("role", "alert");
  box.noValidate = true; // the router judges, and says it in its own words
  button.disabled = !canWrite();
  if (button.disabled) button.title = READ_ONLY;
  box.append(...fields.map((one) => one.box), wrong, button);
  box.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.disabled) return;
    button.disabled = true;
    wrong.textContent = "";
    for (const one of fields) one.tell("");
    try {
      await act();
    } catch (error) {
      const found = fields.find((one) => one.name === error.param);
      if (found) {
        found.tell(error.message.replace(`${found.name}: `, ""));
        found.control.focus();
      } else wrong.textContent = error.message;
    } finally {
      button.disabled = false;
    }
  });
  return box;
}

function copyPlain(node) {
  // Without TLS browsers have no clipboard for scripts; this old way still works in most, and what it marked can be copied.
  getSelection().selectAllChildren(node);
  try { return document.execCommand("copy"); } catch { return false; }
}

// A text with a button that copies it.
export function copyable(text, what) {
  const box = make("div", null, "copyable");
  const node = box.appendChild(make("pre", text));
  node.tabIndex = 0;
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", what);
  const button = box.appendChild(make("button", "Copy"));
  button.type = "button";
  button.setAttribute("aria-label", `Copy ${what}`);
  button.addEventListener("click", async () => {
    let done = false;
    try {
      if (navigator.clipboard) { await navigator.clipboard.writeText(node.textContent); done = true; }
    } catch { /* refused by the browser: the other way is left */ }
    if (done || copyPlain(node)) notice(`Copied: ${what}.`);
    else notice("It is selected: copy it with Ctrl+C.", "warn");
  });
  return box;
}

// Keeps the rows of what has not changed, so that focus and open menus survive. `build(item)` makes a row.
export function rowsIn(body) {
  const kept = new Map();
  return (items, keyOf, build) => {
    const wanted = items.map((item) => {
      const key = keyOf(item), text = JSON.stringify(item);
      const old = kept.get(key);
      if (old?.text === text) return old.row;
      const row = build(item);
      if (old) old.row.replaceWith(row);
      kept.set(key, { row, text });
      return row;
    });
    const keys = new Set(items.map(keyOf));
    for (const [key, { row }] of kept) if (!keys.has(key)) { row.remove(); kept.delete(key); }
    wanted.forEach((row, i) => { if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null); });
  };
}

// Reads `path` at once, and again after a change of what `sign` makes of a snapshot, or after `seconds`.
export function reader(path, sign, seconds, use, fail) {
  let last, at = 0, asking = false, open = true;
  async function read() {
    if (asking) return;
    asking = true;
    at = Date.now();
    try {
      const found = await api("GET", path);
      if (open) { fail(""); use(found); }
    } catch (error) {
      if (open) fail(error.message);
    } finally {
      asking = false;
    }
  }
  read();
  return {
    read,
    update(snapshot) {
      const now = sign(snapshot);
      if (now !== last || Date.now() - at > seconds * 1000) { if (last !== undefined) read(); last = now; }
    },
    close() { open = false; },
  };
}

// The day and the minute, as people here write it.
export function moment(seconds) {
  return seconds === null ? "never"
    : new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

export function agentLink(agent) {
  const link = make("a", agent.name || agent.id);
  link.href = `#/agents/${encodeURIComponent(agent.id)}`;
  return link;
}
