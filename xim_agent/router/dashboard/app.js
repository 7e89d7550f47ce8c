"use strict";
// Every text of an agent or a client goes through textContent: nothing they choose becomes markup.
const byId = (id) => document.getElementById(id);
const units = ["B", "kB", "MB", "GB", "TB"];
const STATUS = {
  online: ["●", "good"], pending: ["○", "warn"], draining: ["◐", "warn"], suspended: ["◌", "warn"],
  disconnected: ["○", "bad"], dead: ["✕", "bad"],
};
let offset = 0; // the router's clock minus ours, seconds

function bytes(n) {
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i += 1; }
  return `${n >= 100 || i === 0 ? Math.round(n) : n.toFixed(1)} ${units[i]}`;
}

function duration(s) {
  s = Math.max(0, Math.round(s));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function cell(row, label, text, className) {
  const td = row.appendChild(make("td", null, className));
  td.dataset.label = label;
  const box = td.appendChild(make("div", text));
  return box;
}

function phase(agent) {
  const p = agent.progress;
  if (!p) return agent.phase || "–";
  if (p.stage === "engine") return `starting · ${p.text || "engine"} · ${duration(p.done)}`;
  const verb = p.stage === "fetch" ? "fetching" : "verifying";
  const left = p.rate > 0 && p.total > p.done ? ` · ${duration((p.total - p.done) / p.rate)} left` : "";
  return `${verb} ${bytes(p.done)} of ${bytes(p.total)}${p.rate > 0 ? ` · ${bytes(p.rate)}/s` : ""}${left}`;
}

function agentRow(agent) {
  const row = make("tr");
  cell(row, "Agent", agent.name || agent.id).append(make("small", agent.id), make("small", `${agent.project} · ${agent.region}`));
  const [sign, tone] = STATUS[agent.status] || ["?", "warn"];
  const status = cell(row, "Status", `${sign} ${agent.status}`);
  status.className = tone;
  for (const c of agent.health) status.append(make("small", `${c.code}: ${c.text}`));
  cell(row, "Tier", agent.tier || "–").append(make("small", agent.accelerator));
  const model = cell(row, "Model", agent.model || "none");
  if (agent.assigned && agent.assigned.split("@")[0] !== agent.model) model.append(make("small", `assigned: ${agent.assigned}`));
  const now = cell(row, "Phase", phase(agent));
  if (agent.progress && agent.progress.total > 0) {
    const bar = now.appendChild(make("progress"));
    bar.max = agent.progress.total;
    bar.value = agent.progress.done;
    bar.setAttribute("aria-label", `${agent.progress.stage} progress`);
  }
  const busy = cell(row, "Running", `${agent.running} / ${agent.ceiling ?? "–"}`, "number");
  if (agent.waiting) busy.append(make("small", `${agent.waiting} waiting in the engine`));
  if (agent.tokens_per_s !== null) busy.append(make("small", `${agent.tokens_per_s.toFixed(1)} tokens/s`));
  const seen = agent.last_seen === null ? "never" : `${duration(Date.now() / 1000 + offset - agent.last_seen)} ago`;
  cell(row, "Last seen", seen, "number");
  return row;
}

function modelRow(model) {
  const row = make("tr");
  cell(row, "Model", model.name).append(make("small", model.task));
  cell(row, "Revision", model.revision);
  cell(row, "Size", bytes(model.size_bytes), "number");
  cell(row, "Stored", bytes(model.stored_bytes), "number");
  cell(row, "Served by", `${model.serving} agent${model.serving === 1 ? "" : "s"}`, "number");
  return row;
}

function fill(name, rows) {
  byId(name).replaceChildren(...rows);
  byId(`${name}-table`).hidden = rows.length === 0;
  byId(`${name}-empty`).hidden = rows.length > 0;
}

function show(data) {
  fill("agents", data.agents.map(agentRow));
  fill("models", data.models.map(modelRow));
  byId("queue").textContent = data.queued ? `${data.queued} request${data.queued === 1 ? "" : "s"} waiting for a slot` : "";
}

const source = new EventSource("/dashboard/events");
source.onopen = () => { byId("link").textContent = "live"; };
source.onerror = () => { byId("link").textContent = "connection lost, trying again"; };
source.onmessage = (event) => {
  const data = JSON.parse(event.data);
  offset = data.time - Date.now() / 1000;
  byId("link").textContent = "live";
  show(data);
};
