// What lets clients ask: API keys, made, shown once, listed and revoked.
import { api, cell, confirmed, duration, empty, make, notice, now, table, writeButton } from "/dashboard/core.js";
import { copyable, field, form, input, moment, reader, rowsIn } from "/dashboard/forms.js";

export const title = "API keys";

function once(made) {
  const box = make("section", null, "card");
  box.tabIndex = -1;
  box.append(make("h2", made.name ? `New key: ${made.name}` : "New key"));
  box.append(make("p", "The key is shown now and never again. It is a password: keep it like one.", "warn"));
  box.append(copyable(made.key, "the API key"));
  box.append(make("p", "Programs that speak OpenAI's API take it with this base URL:"), copyable(made.base_url, "the base URL"));
  return box;
}

export function show(main) {
  const wrong = make("p", "", "bad");
  const project = input("default", 63);
  const known = make("datalist");
  known.id = "projects";
  project.setAttribute("list", "projects");
  const name = input("", 60);
  const result = make("div");
  const keys = table("API keys", ["Name", "Begins", "Project", "State", "Created", "Last used", "Actions"]);
  const put = rowsIn(keys.body);
  const nothing = empty("There is no API key yet. Make one above: clients ask with it, and agents of its project answer.");
  let chosen = false;

  async function revoke(key) {
    const detail = `Clients that use it are refused from now on. It was last used ${used(key)}.`;
    if (!await confirmed(`Revoke ${called(key)}?`, detail, "Revoke")) return;
    try {
      use(await api("POST", `/dashboard/api/keys/${encodeURIComponent(key.id)}/revoke`));
      notice(`${called(key)} is revoked.`);
    } catch (error) { notice(error.message, "bad"); }
  }

  const called = (key) => (key.name ? `the key "${key.name}"` : `the key ${key.beginning || key.id}…`);
  const used = (key) => (key.last_used === null ? "never" : `${duration(now() - key.last_used)} ago`);

  function row(key) {
    const line = make("tr");
    cell(line, "Name", key.name || "–");
    cell(line, "Begins").append(make("code", key.beginning ? `${key.beginning}…` : "not kept"));
    cell(line, "Project", key.project);
    cell(line, "State", key.state).className = key.state === "valid" ? "good" : "dim";
    cell(line, "Created", moment(key.created));
    cell(line, "Last used", moment(key.last_used));
    const last = cell(line, "Actions");
    if (key.state === "valid") {
      const button = writeButton("Revoke", () => revoke(key), "danger");
      button.setAttribute("aria-label", `Revoke ${called(key)}`);
      last.append(button);
    }
    return line;
  }

  function use(data) {
    known.replaceChildren(...data.projects.map((each) => new Option(each, each)));
    if (!chosen && data.projects.length && document.activeElement !== project) project.value = data.projects[0];
    chosen = true;
    put(data.keys, (key) => key.id, row);
    keys.box.hidden = data.keys.length === 0;
    nothing.hidden = data.keys.length > 0;
  }

  const fields = [
    field("project", "Project", project, "Its agents answer."),
    field("name", "Name", name, "What you call it, such as who uses it. May be empty."),
  ];
  const asking = form(fields, "Make an API key", async () => {
    const asked = { project: project.value.trim(), name: name.value.trim() };
    const box = once(await api("POST", "/dashboard/api/keys", asked));
    name.value = "";
    result.replaceChildren(box);
    box.focus();
    await data.read();
  });
  keys.box.hidden = nothing.hidden = true;
  main.append(make("h1", title), asking, known, result, make("h2", "Keys"), wrong, keys.box, nothing);
  const data = reader("/dashboard/api/keys", () => "", 15, use, (text) => { wrong.textContent = text; });
  return { update: data.update, close: data.close };
}
