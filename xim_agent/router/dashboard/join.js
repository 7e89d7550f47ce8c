// A new join key, the ways to start an agent with it, and the agent as it comes in.
import { bar, phase, status } from "/dashboard/agents.js";
import { api, cell, confirmed, empty, make, notice, table, writeButton } from "/dashboard/core.js";
import { agentLink, copyable, field, form, input, moment, reader, rowsIn, select } from "/dashboard/forms.js";

export const title = "Add an agent";

const LIVES = [["3600", "1 hour"], ["86400", "1 day"], ["604800", "7 days"], ["2592000", "30 days"]];

function step(one, number) {
  const item = make("li");
  item.append(make("p", one.say));
  item.append(copyable(one.paste ?? one.command, one.paste ? "the join key" : `step ${number}`));
  return item;
}

function howTo(made) {
  const box = make("section", null, "card");
  box.append(make("h2", `Join key ${made.id}`));
  box.append(make("p", "The key is shown now and never again. It is a password: whoever has it can join.", "warn"));
  box.append(make("p", `It is good for ${made.uses} agent${made.uses === 1 ? "" : "s"} of the project ${made.project},`
    + ` until ${moment(made.expires)}, and leads to ${made.urls.join(" ")}.`));
  const choice = select(made.ways.map((way) => [way.id, way.name]), made.ways[0].id);
  const steps = make("div");
  const choose = () => {
    const way = made.ways.find((one) => one.id === choice.value);
    const list = make("ol", null, "steps");
    list.append(...way.steps.map((one, i) => step(one, i + 1)));
    steps.replaceChildren(...(way.note ? [make("p", way.note, "banner warn")] : []), list);
  };
  choice.addEventListener("change", choose);
  choose();
  box.append(field("way", "How will it run?", choice).box, steps);
  return box;
}

// Who joined by the new key, live.
function watch(made) {
  const box = make("section", null, "card");
  const said = make("p", "");
  const list = make("div");
  const nodes = new Map();
  said.setAttribute("role", "status");
  box.append(make("h2", "Who joins"), said, list);
  function one(agent) {
    const node = make("div", null, "joined");
    const now = make("span"), doing = make("span", "", "dim"), progress = make("progress");
    node.append(agentLink(agent), now, doing, progress);
    list.append(node);
    return { node, now, doing, progress };
  }
  return {
    box,
    update(agents) {
      const online = agents.filter((agent) => agent.status === "online").length;
      const text = !agents.length ? `Waiting for the agent that joins by key ${made.id}.`
        : `${agents.length} of ${made.uses} joined, ${online} online.`;
      if (said.textContent !== text) said.textContent = text;
      for (const agent of agents) {
        if (!nodes.has(agent.id)) nodes.set(agent.id, one(agent));
        const shown = nodes.get(agent.id);
        status(shown.now, agent);
        const text = [phase(agent), ...agent.health.map((c) => c.text), agent.model ? "" : "no model is assigned to it"];
        shown.doing.textContent = text.filter(Boolean).join(" · ");
        bar(shown.progress, agent.progress);
      }
      for (const [id, { node }] of nodes) if (!agents.some((agent) => agent.id === id)) { node.remove(); nodes.delete(id); }
    },
  };
}

export function show(main) {
  const warning = make("p", "", "banner warn");
  const wrong = make("p", "", "bad");
  const project = input("default", 63);
  const known = make("datalist");
  known.id = "projects";
  project.setAttribute("list", "projects");
  const uses = input("1", 5, "number");
  Object.assign(uses, { min: 1, max: 10000 });
  const region = input("local", 24);
  const life = select(LIVES, "86400");
  const result = make("div");
  const keys = table("Join keys", ["Key", "Project", "Region", "State", "Uses left", "Joined by it", "Created", "Expires", "Actions"]);
  const put = rowsIn(keys.body);
  const nothing = empty("There is no join key yet. Make one above: it lets an agent in, and says where the router is.");
  let found = null, made = null, watching = null, snapshot = null, chosen = false;

  async function revoke(key) {
    const detail = "Nobody can join by it any more. Agents that joined already stay.";
    if (!await confirmed(`Revoke join key ${key.id}?`, detail, "Revoke")) return;
    try {
      use(await api("POST", `/dashboard/api/join-keys/${key.id}/revoke`));
      notice(`Join key ${key.id} is revoked.`);
    } catch (error) { notice(error.message, "bad"); }
  }

  function row(key) {
    const line = make("tr");
    cell(line, "Key", String(key.id));
    cell(line, "Project", key.project);
    cell(line, "Region", key.region);
    cell(line, "State", key.state).className = key.state === "valid" ? "good" : "dim";
    cell(line, "Uses left", String(key.uses_left), "number");
    const joined = cell(line, "Joined by it", key.agents.length ? "" : "nobody");
    for (const agent of key.agents) {
      const who = joined.appendChild(make("div"));
      who.append(agentLink(agent), agent.state === "removed" ? " (removed)" : "");
    }
    cell(line, "Created", moment(key.created));
    cell(line, "Expires", moment(key.expires));
    const last = cell(line, "Actions");
    if (key.state !== "revoked") {
      const button = writeButton("Revoke", () => revoke(key), "danger");
      button.setAttribute("aria-label", `Revoke join key ${key.id}`);
      last.append(button);
    }
    return line;
  }

  function follow() {
    if (!watching || !found || !snapshot) return;
    const ids = new Set(found.keys.find((key) => key.id === made.id)?.agents.map((agent) => agent.id));
    watching.update(snapshot.agents.filter((agent) => ids.has(agent.id)));
  }

  function use(data) {
    found = data;
    known.replaceChildren(...data.projects.map((name) => new Option(name, name)));
    if (!chosen && data.projects.length && document.activeElement !== project) project.value = data.projects[0];
    chosen = true;
    warning.hidden = !data.only_here;
    warning.textContent = data.only_here ? `A key made now leads to ${data.urls.join(" ")}, which is this router for its own`
      + " machine only. For agents elsewhere, start it with --public-url http://HOST:PORT first." : "";
    put(data.keys, (key) => key.id, row);
    keys.box.hidden = data.keys.length === 0;
    nothing.hidden = data.keys.length > 0;
    follow();
  }

  const fields = [
    field("project", "Project", project, "Clients with an API key of the same project are answered by it."),
    field("region", "Region", region, "Where it stands, in your own words."),
    field("uses", "Agents", uses, "How many may join by this key."),
    field("lifetime", "Valid for", life),
  ];
  const asking = form(fields, "Make a join key", async () => {
    made = await api("POST", "/dashboard/api/join-keys", {
      project: project.value.trim(), region: region.value.trim(), uses: Number(uses.value || 0), lifetime: Number(life.value),
    });
    watching = watch(made);
    watching.update([]);
    const heading = howTo(made);
    result.replaceChildren(heading, watching.box);
    heading.tabIndex = -1;
    heading.focus();
    await data.read();
  });
  warning.hidden = keys.box.hidden = nothing.hidden = true;
  main.append(make("h1", title), warning, asking, known, result, make("h2", "Join keys"), wrong, keys.box, nothing);
  const sign = (shown) => shown.agents.map((agent) => `${agent.id} ${agent.name}`).join("\n");
  const data = reader("/dashboard/api/join-keys", sign, 10, use, (text) => { wrong.textContent = text; });
  return {
    update(latest) {
      snapshot = latest;
      data.update(latest);
      follow();
    },
    close() { data.close(); },
  };
}
