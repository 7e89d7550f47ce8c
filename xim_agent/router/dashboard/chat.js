// A conversation with a served model. It is kept in memory only: nothing of it is stored anywhere.
import { canWrite, confirmed, empty, make, notice, READ_ONLY, send } from "/dashboard/core.js";
import { field, input, select } from "/dashboard/forms.js";

export const title = "Try it";

const said = []; // {role, content} of this visit; `note` and `bad` are shown, not sent
let wanted = ""; // the model that was chosen

// The events of a stream, as text.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        yield part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a connection that is gone there is nothing to say
  }
}

function turn(message) {
  const node = make("article", null, `turn ${message.role}`);
  node.append(make("h2", message.role === "user" ? "You" : "Model"));
  const thought = node.appendChild(make("details"));
  thought.append(make("summary", "Reasoning"));
  const reasons = thought.appendChild(make("div", "", "text dim"));
  const text = node.appendChild(make("div", "", "text"));
  const note = node.appendChild(make("p", ""));
  return {
    node,
    draw() {
      thought.hidden = !message.reasoning;
      if (message.reasoning && reasons.textContent !== message.reasoning) reasons.textContent = message.reasoning;
      if (text.textContent !== message.content) text.textContent = message.content;
      text.hidden = !message.content;
      note.textContent = message.note || "";
      note.hidden = !message.note;
      note.className = message.bad ? "bad" : "dim";
    },
  };
}

// What is sent: questions with their answers, as far as they came, and the last question. Templates want them by turns.
function conversation() {
  const good = said.filter((message, i) => message.content && (said[i + 1]?.role !== "assistant" || said[i + 1].content));
  return good.map(({ role, content }) => ({ role, content }));
}

// What a chunk adds to the answer. Throws what the router or the engine said.
function take(message, chunk, count) {
  if (chunk.error) throw new Error(chunk.error.message || JSON.stringify(chunk.error));
  if (chunk.usage) count.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices?.[0];
  const more = choice?.delta?.content || "", why = choice?.delta?.reasoning_content || choice?.delta?.reasoning || "";
  if (choice?.finish_reason) count.ending = choice.finish_reason;
  if (!more && !why) return;
  count.first ??= performance.now();
  count.last = performance.now();
  count.pieces += 1;
  message.content += more;
  message.reasoning = (message.reasoning || "") + why;
}

function summary(count, begun) {
  if (count.first === undefined) return "The answer is empty.";
  const tokens = count.tokens ?? count.pieces, seconds = (count.last - count.first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s · ` : "";
  const cut = count.ending === "length" ? " · cut at the most tokens allowed" : "";
  return `${tokens} token${tokens === 1 ? "" : "s"} · ${rate}first after ${((count.first - begun) / 1000).toFixed(2)} s${cut}`;
}

// Fills `message` until its end; a signal that was aborted is no error.
async function answer(message, asked, signal, changed) {
  const begun = performance.now(), count = { pieces: 0 };
  try {
    const reply = await send("POST", "/dashboard/api/chat", asked, signal);
    let complete = false;
    for await (const event of events(reply.body)) {
      if (event === "[DONE]") complete = true;
      else if (event) take(message, JSON.parse(event), count);
      changed();
    }
    if (!complete) throw new Error("The answer was cut off.");
    message.note = summary(count, begun);
  } catch (error) {
    const stopped = signal.aborted;
    message.note = stopped ? `Stopped. ${count.first === undefined ? "" : summary(count, begun)}` : error.message;
    if (error instanceof TypeError && !stopped) message.note = "The connection to the router broke.";
    message.bad = !stopped;
    message.param = stopped ? null : error.param;
  }
  changed();
}

function composer(ask) {
  const box = make("form", null, "composer");
  const text = make("textarea");
  text.rows = 3;
  const asking = field("message", "Message", text, "Enter sends, Shift+Enter begins a new line.");
  const go = make("button", "Send", "primary"), stop = make("button", "Stop", "danger"), clear = make("button", "New conversation");
  stop.type = clear.type = "button";
  const buttons = make("div", null, "buttons");
  buttons.append(go, stop, clear);
  box.append(asking.box, buttons);
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    box.requestSubmit();
  });
  box.addEventListener("submit", (event) => {
    event.preventDefault();
    if (go.disabled || !text.value.trim()) return;
    const words = text.value;
    text.value = "";
    ask(words);
  });
  return { box, text, go, stop, clear };
}

// What is served now: [value, text] for each project's model.
function served(snapshot) {
  const found = new Map();
  for (const agent of snapshot.agents) {
    if (agent.status !== "online" || agent.phase !== "ready" || !agent.model) continue;
    found.set(JSON.stringify([agent.project, agent.model]), `${agent.model} (${agent.project})`);
  }
  return [...found].sort((a, b) => a[1].localeCompare(b[1]));
}

export function show(main) {
  const nothing = empty("No model answers now. Publish one and assign it, add an agent, and wait until it is ready.");
  const ways = nothing.appendChild(make("p"));
  for (const [hash, text] of [["#/models", "Models"], ["#/join", "Add an agent"], ["#/agents", "Agents"]]) {
    ways.appendChild(make("a", text, "button")).href = hash;
    ways.append(" ");
  }
  const choice = select([]), most = input("", 7, "number");
  most.min = 1;
  const settings = make("div", null, "settings");
  const bound = field("max_tokens", "Most tokens", most, "Empty: as the engine has it.");
  settings.append(field("model", "Model", choice).box, bound.box);
  const log = make("section", null, "log");
  log.setAttribute("aria-label", "Conversation");
  let running = null, known = "", choices = [];

  function append(message) {
    const one = turn(message);
    log.append(one.node);
    one.draw();
    one.node.scrollIntoView({ block: "end" });
    return one;
  }

  function ready() {
    const can = canWrite() && !running && choices.length > 0;
    parts.go.disabled = !can;
    parts.go.title = canWrite() ? "" : READ_ONLY;
    parts.stop.hidden = !running;
    parts.clear.hidden = said.length === 0;
    nothing.hidden = choices.length > 0 || known === "";
  }

  async function ask(words) {
    const [project, model] = JSON.parse(choice.value);
    append(said[said.push({ role: "user", content: words }) - 1]);
    const sent = conversation();
    const message = { role: "assistant", content: "", note: "waiting for the first token" };
    const one = append(said[said.push(message) - 1]);
    const mine = running = new AbortController();
    ready();
    const near = () => innerHeight + scrollY > document.body.scrollHeight - 200;
    const asked = { project, model, messages: sent, max_tokens: most.value ? Number(most.value) : null };
    await answer(message, asked, mine.signal, () => {
      const follow = near();
      if (message.content || message.reasoning) message.note = mine === running && message.note?.startsWith("waiting") ? "" : message.note;
      one.draw();
      if (follow) one.node.scrollIntoView({ block: "end" });
    });
    if (mine !== running) return;
    running = null;
    bound.tell(message.param === bound.name ? message.note : "");
    if (log.isConnected) notice(message.bad ? "The answer ended with an error." : "The answer is complete.", message.bad ? "warn" : "good");
    ready();
  }

  function clearAll() {
    running?.abort();
    running = null;
    said.length = 0;
    log.replaceChildren();
    ready();
    parts.text.focus();
  }

  const parts = composer(ask);
  parts.stop.addEventListener("click", () => { running?.abort(); parts.text.focus(); });
  parts.clear.addEventListener("click", async () => {
    if (await confirmed("Begin a new conversation?", "This one is kept nowhere.", "Begin anew")) clearAll();
  });
  choice.addEventListener("change", () => { wanted = choice.value; });
  nothing.hidden = true;
  main.append(make("h1", title), nothing, settings, log, parts.box);
  for (const message of said) append(message);
  ready();
  return {
    update(snapshot) {
      choices = served(snapshot);
      const text = JSON.stringify(choices);
      if (text !== known) {
        known = text;
        const old = wanted || choice.value;
        choice.replaceChildren(...choices.map(([value, label]) => new Option(label, value, false, value === old)));
      }
      ready();
    },
    close() { running?.abort(); },
  };
}
