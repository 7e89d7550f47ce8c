// Published models: what they weigh, who serves them, who is to.
import { api, bytes, cell, confirmed, empty, make, notice, table, writeButton } from "/dashboard/core.js";
import { agentLink, copyable, moment, reader, rowsIn, select } from "/dashboard/forms.js";

export const title = "Models";

export function show(main) {
  const wrong = make("p", "", "bad");
  const busy = make("p", "A model is being published or removed at this moment.", "banner warn");
  const heads = ["Model", "Revision", "Size", "Stored", "Published", "Served by", "Assigned to", "Actions"];
  const models = table("Models", heads);
  const put = rowsIn(models.body);
  const nothing = empty("No model is published yet. Publish one with the command below; then assign it here.");
  const how = make("section", null, "card");
  let agents = [];

  async function change(what, asked, done) {
    try {
      use(await api("POST", `/dashboard/api/models/${what}`, asked));
      notice(done);
    } catch (error) { notice(error.message, "bad"); }
  }

  const named = (model) => `${model.model}@${model.revision}`;

  async function assign(model, id) {
    const who = id ? agents.find((agent) => agent.id === id)?.name || id : "all agents";
    const detail = "Whoever serves another model now finishes its requests, then loads this one."
      + (id ? "" : " Agents with an assignment of their own keep that.");
    if (!await confirmed(`Give ${named(model)} to ${who}?`, detail, "Assign")) return;
    await change("assign", { model: model.model, revision: model.revision, agent: id || null }, `${named(model)} goes to ${who}.`);
  }

  async function takeBack(model, who) {
    const detail = who.id ? "It gets the model of all agents then, if there is one; else it stops its engine."
      : "Agents without an assignment of their own finish their requests and stop their engines.";
    if (!await confirmed(`Take ${named(model)} back from ${who.name}?`, detail, "Take back")) return;
    const asked = { model: model.model, revision: model.revision, agent: who.id };
    await change("unassign", asked, `${named(model)} is taken back from ${who.name}.`);
  }

  async function remove(model) {
    const detail = `Its files are deleted from the router: ${bytes(model.stored)}, less what other models share.`
      + " Agents that still serve it go on until they need another one.";
    if (!await confirmed(`Remove ${named(model)}?`, detail, "Remove")) return;
    await change("remove", { model: model.model, revision: model.revision }, `${named(model)} is removed.`);
  }

  function assigned(line, model) {
    const box = cell(line, "Assigned to", model.agents.length ? "" : "nobody");
    for (const who of model.agents) {
      const one = box.appendChild(make("div", null, "inline"));
      one.append(who.id ? agentLink(who) : make("span", who.name));
      const button = writeButton("Take back", () => takeBack(model, who), "quiet");
      button.setAttribute("aria-label", `Take back ${named(model)} from ${who.name}`);
      one.append(button);
    }
  }

  function acts(line, model) {
    const box = cell(line, "Actions");
    const has = new Set(model.agents.map((who) => who.id ?? ""));
    const choices = [["", "all agents"], ...agents.map((agent) => [agent.id, agent.name || agent.id])];
    const open = choices.filter(([id]) => !has.has(id));
    const inline = box.appendChild(make("div", null, "inline"));
    if (open.length) {
      const choice = inline.appendChild(select(open, open[0][0]));
      choice.setAttribute("aria-label", `Whom to give ${named(model)}`);
      inline.append(writeButton("Assign", () => assign(model, choice.value)));
    }
    const button = writeButton("Remove", () => remove(model), "danger");
    button.setAttribute("aria-label", `Remove ${named(model)}`);
    if (model.agents.length) {
      button.disabled = true;
      button.title = button.title || "It is assigned: take it back first.";
    }
    inline.append(button);
  }

  function row({ model }) {
    const line = make("tr");
    cell(line, "Model", model.model).append(make("small", model.task));
    cell(line, "Revision", model.revision);
    cell(line, "Size", bytes(model.size), "number");
    const part = model.size ? ` (${Math.round(100 * model.stored / model.size)} %)` : "";
    cell(line, "Stored", `${bytes(model.stored)}${part}`, "number");
    cell(line, "Published", moment(model.published));
    const serving = cell(line, "Served by", model.serving.length ? "" : "nobody");
    for (const agent of model.serving) serving.appendChild(make("div")).append(agentLink(agent));
    assigned(line, model);
    acts(line, model);
    return line;
  }

  function use(data) {
    agents = data.agents;
    const all = agents.map((agent) => [agent.id, agent.name]);
    put(data.models.map((model) => ({ model, all })), ({ model }) => named(model), row);
    models.box.hidden = data.models.length === 0;
    nothing.hidden = data.models.length > 0;
    busy.hidden = !data.publishing;
    if (!how.childElementCount) {
      how.append(make("h2", "Publish a model"), make("p", "On the router's machine; PATH is a directory in Hugging Face's"
        + " layout with safetensors, NAME what clients will call it. It may run beside this router, and be cut off and run again:"),
      copyable(data.publish, "the command"));
    }
  }

  models.box.hidden = nothing.hidden = busy.hidden = true;
  main.append(make("h1", title), busy, wrong, models.box, nothing, how);
  const sign = (data) => JSON.stringify([data.models, data.agents.map((a) => [a.id, a.name, a.model, a.phase, a.assigned])]);
  const data = reader("/dashboard/api/models", sign, 5, use, (text) => { wrong.textContent = text; });
  return { update: data.update, close: data.close };
}
