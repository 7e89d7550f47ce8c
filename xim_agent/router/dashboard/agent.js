import { api, bytes, cell, confirmed, duration, empty, make, notice, table, writeButton } from "/dashboard/core.js";
import { bar, phase, say, seen, share, speed, status } from "/dashboard/agents.js";
import { Chart } from "/dashboard/charts.js";

export const title = "Agent";

const EVERY_MS = 5000; // charts have a point for every 10 s
const FEW = 20; // events that are shown at first

const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);
const whole = (n) => (n >= 1000 ? `${(n / 1000).toFixed(1)}k` : String(Math.round(n * 10) / 10));
const CHARTS = [
  ["Tokens per second", [["tokens_per_s", "tokens/s"]], whole],
  ["Time to the first token", [["ttft_p50", "half of them within"], ["ttft_p99", "99 % within"]], seconds],
  ["Time between tokens", [["gap_p99", "99 % within"]], seconds],
  ["KV cache in use", [["kv_usage", "in use"]], share],
  ["Requests at once", [["running", "running"], ["waiting", "waiting in the engine"]], whole],
  ["Requests ended in 10 s", [["ended", "ended"], ["errors", "with an error"]], whole],
];
const WHAT = {
  enrolled: "enrolled", connected: "connected", disconnected: "disconnected", restarted: "restarted", phase: "phase",
  assigned: "model assigned", serving: "serves", engine_failed: "engine failed", health: "condition", health_over: "condition over",
  suspended: "suspended", resumed: "resumed", drained: "drain", undrained: "drain over", removed: "removed",
  credentials_revoked: "credentials revoked",
};
const BY = { dashboard: "dashboard", command: "command line" };

// What each button asks, and what it says when it is done. Two words: the second undoes what the first does.
const ACTIONS = {
  suspend: ["Suspend", "It gets no request until it is resumed. What it is answering it finishes.", "is suspended"],
  resume: ["Resume", "It gets requests again; it notices within 30 s.", "gets requests again"],
  drain: ["Drain", "It finishes what it has and takes nothing new. Its engine stays up.", "drains"],
  undrain: ["End the drain", "It takes requests again.", "takes requests again"],
  "revoke-credentials": ["Revoke credentials",
    "Its tokens open nothing any more, at once. It enrolls again by itself if its join key is still good, else it stops.",
    "must enroll again"],
  remove: ["Remove", "It stops at once and can only come back with a new join key. What it is answering fails or goes to others.",
    "is removed"],
};

function list(rows) {
  const box = make("dl");
  for (const [label, text] of rows) {
    if (text !== null && text !== undefined && text !== "") box.append(make("dt", label), make("dd", String(text)));
  }
  return box;
}

function section(main, text) {
  const box = main.appendChild(make("section"));
  box.append(make("h2", text));
  return box.appendChild(make("div"));
}

// Replaced only when it says something else: what is selected stays selected.
function redo(place, value, draw) {
  const text = JSON.stringify(value);
  if (place.dataset.said === text) return;
  place.dataset.said = text;
  place.replaceChildren(draw(value));
}

function conditions(health) {
  if (!health.length) return make("p", "It reports nothing that is wrong.", "dim");
  const box = make("ul", null, "conditions");
  for (const c of health) {
    const item = box.appendChild(make("li"));
    item.append(make("strong", c.code), make("span", `: ${c.text}`));
    if (c.hint) item.append(make("p", `What to do: ${c.hint}`));
    if (c.since !== null) item.append(make("small", `since ${new Date(c.since * 1000).toLocaleString()}`));
  }
  return box;
}

function hardware(h) {
  const box = make("div");
  const gpus = h.devices.map((d, i) => [`GPU ${i}`, [d.name, d.memory_bytes === null ? null : bytes(d.memory_bytes),
    d.compute && `compute ${d.compute}`, d.mig ? "MIG slice" : null].filter(Boolean).join(" · ")]);
  const cores = [h.cores === null ? null : `${h.cores} cores`, h.threads === null ? null : `${h.threads} threads`];
  box.append(list([...gpus, ["CPU", [h.cpu, ...cores].filter(Boolean).join(" · ")],
    ["Memory", h.memory_bytes === null ? null : bytes(h.memory_bytes)], ["Driver", h.driver], ["CUDA", h.cuda]]));
  if (!box.querySelector("dt")) box.append(make("p", "It said nothing of its hardware when it enrolled.", "dim"));
  return box;
}

function slots(found) {
  if (!found.length) return make("p", "It answers nothing now.", "dim");
  const made = table("Requests that it has now", ["Request", "Path", "For", "Sent", "State"]);
  for (const s of found) {
    const row = made.body.appendChild(make("tr"));
    cell(row, "Request", s.request);
    cell(row, "Path", s.path);
    cell(row, "For", seconds(s.seconds), "number");
    cell(row, "Sent", bytes(s.bytes), "number");
    cell(row, "State", s.state);
  }
  return made.box;
}

function history(found, all) {
  if (!found.length) return make("p", "Nothing has happened yet; what changes with it will stand here.", "dim");
  const made = table("History", ["When", "What", "Detail", "By"]);
  for (const e of all ? found : found.slice(0, FEW)) {
    const row = made.body.appendChild(make("tr"));
    cell(row, "When", new Date(e.at * 1000).toLocaleString());
    cell(row, "What", WHAT[e.kind] || e.kind);
    cell(row, "Detail", e.text || "–");
    cell(row, "By", BY[e.who] || "itself");
  }
  return made.box;
}

class Page {
  constructor(main, id) {
    this.id = id;
    this.main = main;
    this.path = `/dashboard/api/agents/${encodeURIComponent(id)}`;
    this.gone = new AbortController();
    this.detail = null;
    this.all = false;
    const back = make("p");
    back.appendChild(make("a", "‹ All agents")).href = "#/agents";
    this.name = make("h1", "…");
    this.status = make("p");
    this.body = make("div");
    this.body.hidden = true;
    main.append(back, this.name, this.status, this.body);
    this.build();
    this.load();
  }

  build() {
    this.buttons = make("div", null, "buttons");
    this.pause = writeButton("Suspend", () => this.act(this.detail.suspended ? "resume" : "suspend"));
    this.drain = writeButton("Drain", () => this.act(this.detail.drain ? "undrain" : "drain"));
    this.buttons.append(this.pause, this.drain, writeButton("Revoke credentials", () => this.act("revoke-credentials"), "danger"),
      writeButton("Remove", () => this.act("remove"), "danger"));
    this.body.append(this.buttons);
    this.health = section(this.body, "Health");
    const at = section(this.body, "Now");
    this.phase = at.appendChild(make("p"));
    this.bar = at.appendChild(make("progress"));
    this.now = at.appendChild(make("div"));
    const charts = section(this.body, "The last hour");
    charts.className = "charts";
    this.charts = CHARTS.map((chart) => new Chart(...chart));
    charts.append(...this.charts.map((chart) => chart.node));
    this.slots = section(this.body, "Requests");
    this.hardware = section(this.body, "Hardware");
    this.about = section(this.body, "Versions and identity");
    this.history = section(this.body, "History");
    this.older = make("button", "Show all of it");
    this.older.type = "button";
    this.older.addEventListener("click", () => { this.all = true; this.older.hidden = true; this.draw(); });
    this.history.after(this.older);
  }

  async load() {
    clearTimeout(this.timer);
    try {
      this.detail = await api("GET", this.path, undefined, this.gone.signal);
      this.draw();
    } catch (error) {
      if (error.name === "AbortError" || this.gone.signal.aborted) return;
      if (error.code === "agent_unknown") { this.unknown(error.message); return; }
      say(this.status, error.message);
    }
    if (!this.gone.signal.aborted) this.timer = setTimeout(() => this.load(), EVERY_MS);
  }

  unknown(why) {
    this.close();
    say(this.name, "No such agent");
    this.body.replaceChildren(empty(`${why}. “Add an agent” shows how one joins.`));
    this.body.hidden = false;
  }

  // What the stream tells every second.
  live(agent) {
    document.title = `${agent.name || agent.id} · XIM router`;
    say(this.name, agent.name || agent.id);
    status(this.status, agent);
    redo(this.health, agent.health, conditions);
    say(this.phase, phase(agent));
    bar(this.bar, agent.progress);
    redo(this.now, [
      ["Model", agent.model || "none"], ["Assigned", agent.assigned || "none"],
      ["Running", `${agent.running} of ${agent.ceiling ?? "–"}`],
      ["Waiting in the engine", agent.waiting], ["Tokens", speed(agent)], ["KV cache", share(agent.kv_usage)],
      ["Last seen", seen(agent)],
    ], list);
  }

  draw() {
    const d = this.detail;
    this.body.hidden = false;
    this.live(d);
    this.buttons.hidden = d.removed;
    say(this.pause, d.suspended ? "Resume" : "Suspend");
    say(this.drain, d.drain ? "End the drain" : "Drain");
    const codes = Object.entries(d.series.codes).map(([code, n]) => `${code} ${n}`).join(", ");
    this.charts.forEach((chart, i) => chart.update(d.series, i === CHARTS.length - 1 && codes ? `Errors: ${codes}` : ""));
    redo(this.slots, d.slots, slots);
    redo(this.hardware, d.hardware, hardware);
    redo(this.about, [
      ["Agent", d.version], ["vLLM", d.vllm || "not known yet"], ["Protocol", d.protocol], ["Tier", d.tier], ["Id", d.id],
      ["Worker", d.worker_id], ["Project", d.project], ["Region", d.region], ["Enrolled", new Date(d.enrolled * 1000).toLocaleString()],
      ["From", d.address], ["By join key", `number ${d.join_key}`], ["Credential", d.credential], ["Host", d.hostname],
      ["Platform", d.platform],
    ], list);
    redo(this.history, [d.events, this.all], ([events, all]) => history(events, all));
    this.older.hidden = this.all || d.events.length <= FEW;
  }

  async act(name) {
    const [verb, detail, done] = ACTIONS[name];
    const who = this.detail.name || this.id;
    if (!await confirmed(`${verb}: ${who}?`, detail, verb)) return;
    try {
      this.detail = await api("POST", `${this.path}/${name}`);
      this.draw();
      notice(`${who} ${done}.`);
    } catch (error) {
      notice(error.message, "bad");
    }
  }

  close() {
    this.gone.abort();
    clearTimeout(this.timer);
    for (const chart of this.charts) chart.close();
  }
}

export function show(main, id) {
  const page = new Page(main, id);
  return {
    update(data) {
      const agent = data.agents.find((one) => one.id === id);
      if (agent && page.detail) page.live(agent);
    },
    close: () => page.close(),
  };
}
