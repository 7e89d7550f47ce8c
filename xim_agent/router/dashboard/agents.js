import { bytes, cell, duration, empty, make, now, table } from "/dashboard/core.js";

export const title = "Agents";

const STATUS = {
  online: ["●", "good"], pending: ["○", "warn"], draining: ["◐", "warn"], suspended: ["◌", "warn"],
  disconnected: ["○", "bad"], dead: ["✕", "bad"],
};

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
  const shown = cell(row, "Phase", phase(agent));
  if (agent.progress && agent.progress.total > 0) {
    const bar = shown.appendChild(make("progress"));
    bar.max = agent.progress.total;
    bar.value = agent.progress.done;
    bar.setAttribute("aria-label", `${agent.progress.stage} progress`);
  }
  const busy = cell(row, "Running", `${agent.running} / ${agent.ceiling ?? "–"}`, "number");
  if (agent.waiting) busy.append(make("small", `${agent.waiting} waiting in the engine`));
  if (agent.tokens_per_s !== null) busy.append(make("small", `${agent.tokens_per_s.toFixed(1)} tokens/s`));
  cell(row, "Last seen", agent.last_seen === null ? "never" : `${duration(now() - agent.last_seen)} ago`, "number");
  return row;
}

export function show(main) {
  const agents = table("Agents", ["Agent", "Status", "Tier", "Model", "Phase", "Running", "Last seen"]);
  const nothing = empty("No agent has joined yet. Make a join key here, and start an agent with it where the GPU is:",
    "xerotier-xim-agent router join-key create --project NAME --data DIR\nXEROTIER_AGENT_JOIN_KEY=xjk_… xerotier-xim-agent run");
  const queue = make("p", "", "dim");
  agents.box.hidden = nothing.hidden = true;
  main.append(make("h1", title), agents.box, nothing, queue);
  return {
    update(data) {
      agents.body.replaceChildren(...data.agents.map(agentRow));
      agents.box.hidden = data.agents.length === 0;
      nothing.hidden = data.agents.length > 0;
      queue.textContent = data.queued ? `${data.queued} request${data.queued === 1 ? "" : "s"} waiting for a slot` : "";
    },
    close() {},
  };
}
