import { bytes, duration, empty, make, now, table } from "/dashboard/core.js";

export const title = "Agents";

const FEW = 10; // so many are seen at a glance: no need to search or sort
const STATUS = {
  online: ["●", "good"], pending: ["○", "warn"], draining: ["◐", "warn"], suspended: ["◌", "warn"],
  disconnected: ["○", "bad"], dead: ["✕", "bad"], removed: ["✕", "bad"],
};
const TROUBLE = ["dead", "disconnected", "suspended", "draining", "pending", "online"];
const ORDERS = {
  Name: (a, b) => (a.name || a.id).localeCompare(b.name || b.id),
  "Trouble first": (a, b) => TROUBLE.indexOf(a.status) - TROUBLE.indexOf(b.status) || b.health.length - a.health.length,
  "Tokens per second": (a, b) => (b.tokens_per_s ?? -1) - (a.tokens_per_s ?? -1),
  "KV cache": (a, b) => (b.kv_usage ?? -1) - (a.kv_usage ?? -1),
  "Last seen": (a, b) => (b.last_seen ?? -1) - (a.last_seen ?? -1),
};

// Only what has changed is touched: what somebody has selected or points at stays.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function says(node, texts) {
  while (node.children.length > texts.length) node.lastElementChild.remove();
  while (node.children.length < texts.length) node.append(make("small"));
  texts.forEach((text, i) => say(node.children[i], text));
}

export function phase(agent) {
  const p = agent.progress;
  if (!p) return agent.phase || "–";
  if (p.stage === "engine") return `starting · ${p.text || "engine"} · ${duration(p.done)}`;
  const verb = p.stage === "fetch" ? "fetching" : "verifying";
  const left = p.rate > 0 && p.total > p.done ? ` · ${duration((p.total - p.done) / p.rate)} left` : "";
  return `${verb} ${bytes(p.done)} of ${bytes(p.total)}${p.rate > 0 ? ` · ${bytes(p.rate)}/s` : ""}${left}`;
}

// The bar of a phase: there while something with a known end is under way.
export function bar(node, progress) {
  const known = Boolean(progress && progress.total > 0);
  node.hidden = !known;
  if (!known) return;
  node.max = progress.total;
  node.value = Math.min(progress.done, progress.total);
  node.setAttribute("aria-label", `${progress.stage} progress`);
}

export function status(node, agent) {
  const [sign, tone] = STATUS[agent.status] || ["?", "warn"];
  say(node, `${sign} ${agent.status}`);
  node.className = tone;
}

export const speed = (agent) => (agent.tokens_per_s === null ? "–" : `${agent.tokens_per_s.toFixed(1)}/s`);
export const share = (part) => (part === null ? "–" : `${Math.round(Math.min(Math.max(part, 0), 1) * 100)} %`);

export function seen(agent) {
  if (agent.last_seen === null) return "never";
  const ago = now() - agent.last_seen;
  return ago < 5 ? "now" : `${duration(ago)} ago`;
}

// A row that stays for as long as its agent is there.
class Row {
  constructor(id) {
    this.node = make("tr");
    const part = (label, className) => {
      const td = this.node.appendChild(make("td", null, className));
      td.dataset.label = label;
      const box = td.appendChild(make("div"));
      return [box.appendChild(make("span")), box.appendChild(make("div"))];
    };
    const [name, where] = part("Agent");
    this.link = name.appendChild(make("a"));
    this.link.href = `#/agents/${encodeURIComponent(id)}`;
    this.where = where;
    [this.status, this.health] = part("Status");
    [this.tier, this.accelerator] = part("Tier");
    [this.model, this.assigned] = part("Model");
    [this.phase, this.barBox] = part("Phase");
    this.bar = this.barBox.appendChild(make("progress"));
    [this.running, this.waiting] = part("Running", "number");
    [this.speed] = part("Tokens", "number");
    [this.kv] = part("KV cache", "number");
    [this.seen] = part("Last seen", "number");
  }

  update(agent) {
    this.agent = agent;
    this.words = [agent.name, agent.id, agent.project, agent.region, agent.status, agent.tier, agent.accelerator,
      agent.model, agent.assigned, agent.phase, ...agent.health.map((c) => c.code)].join("\n").toLowerCase();
    say(this.link, agent.name || agent.id);
    says(this.where, [agent.id, `${agent.project} · ${agent.region}`]);
    status(this.status, agent);
    says(this.health, agent.health.map((c) => `${c.code}: ${c.text}`));
    say(this.tier, agent.tier || "–");
    says(this.accelerator, agent.accelerator ? [agent.accelerator] : []);
    say(this.model, agent.model || "none");
    says(this.assigned, agent.assigned && agent.assigned.split("@")[0] !== agent.model ? [`assigned: ${agent.assigned}`] : []);
    say(this.phase, phase(agent));
    bar(this.bar, agent.progress);
    say(this.running, `${agent.running} / ${agent.ceiling ?? "–"}`);
    says(this.waiting, agent.waiting ? [`${agent.waiting} waiting in the engine`] : []);
    say(this.speed, speed(agent));
    say(this.kv, share(agent.kv_usage));
    say(this.seen, seen(agent));
  }
}

function tools(changed) {
  const box = make("div", null, "tools");
  const search = make("label", "Find ");
  const input = search.appendChild(make("input"));
  input.type = "search";
  input.placeholder = "name, id, model, status…";
  const sort = make("label", "Sort by ");
  const select = sort.appendChild(make("select"));
  for (const order of Object.keys(ORDERS)) select.append(make("option", order));
  const count = make("span", "", "dim");
  box.append(search, sort, count);
  input.addEventListener("input", changed);
  select.addEventListener("change", changed);
  return { box, count, words: () => input.value.toLowerCase().split(/\s+/).filter(Boolean), order: () => ORDERS[select.value] };
}

export function show(main) {
  const heads = ["Agent", "Status", "Tier", "Model", "Phase", "Running", "Tokens", "KV cache", "Last seen"];
  const agents = table("Agents", heads);
  const nothing = empty("No agent has joined yet. “Add an agent” makes a join key and shows how to start an agent with it; "
    + "in a terminal it is:",
    "xerotier-xim-agent router join-key create --project NAME --data DIR\nXEROTIER_AGENT_JOIN_KEY=xjk_… xerotier-xim-agent run");
  const add = nothing.appendChild(make("p")).appendChild(make("a", "Add an agent", "button primary"));
  add.href = "#/join";
  const queue = make("p", "", "dim");
  const rows = new Map();
  const find = tools(arrange);
  agents.box.hidden = nothing.hidden = find.box.hidden = true;
  main.append(make("h1", title), find.box, agents.box, nothing, queue);

  function arrange() {
    const words = find.words();
    const ordered = [...rows.values()].sort((a, b) => find.order()(a.agent, b.agent) || (a.agent.id < b.agent.id ? -1 : 1));
    let place = agents.body.firstElementChild;
    let shown = 0;
    for (const row of ordered) { // a row that is where it belongs is not moved: it may have the focus
      if (row.node === place) place = place.nextElementSibling;
      else agents.body.insertBefore(row.node, place);
      row.node.hidden = !words.every((word) => row.words.includes(word));
      shown += row.node.hidden ? 0 : 1;
    }
    say(find.count, words.length ? `${shown} of ${rows.size}` : `${rows.size} agents`);
  }

  return {
    update(data) {
      const there = new Set();
      for (const agent of data.agents) {
        there.add(agent.id);
        if (!rows.has(agent.id)) rows.set(agent.id, new Row(agent.id));
        rows.get(agent.id).update(agent);
      }
      for (const [id, row] of rows) {
        if (!there.has(id)) { row.node.remove(); rows.delete(id); }
      }
      find.box.hidden = rows.size <= FEW && !find.words().length;
      agents.box.hidden = rows.size === 0;
      nothing.hidden = rows.size > 0;
      arrange();
      say(queue, data.queued ? `${data.queued} request${data.queued === 1 ? "" : "s"} waiting for a slot` : "");
    },
    close() {},
  };
}
