// What every page is made of. Every text of an agent or a client goes through textContent: nothing they choose becomes markup.
const byId = (id) => document.getElementById(id);
const UNITS = ["B", "kB", "MB", "GB", "TB"];

// Who looks, and the router's clock minus ours in seconds; app.js sets them.
export const session = { role: null, csrf: null, offset: 0 };

export const READ_ONLY = "You are signed in to look only; an admin link lets you change things.";

export const canWrite = () => session.role === "admin";

// The router's time now, seconds.
export const now = () => Date.now() / 1000 + session.offset;

export function bytes(n) {
  let i = 0;
  while (n >= 1000 && i < UNITS.length - 1) { n /= 1000; i += 1; }
  return `${n >= 100 || i === 0 ? Math.round(n) : n.toFixed(1)} ${UNITS[i]}`;
}

export function duration(s) {
  s = Math.max(0, Math.round(s));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}

export function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// A cell of a table that becomes a list of cards on a narrow screen, where `label` stands before it.
export function cell(row, label, text, className) {
  const td = row.appendChild(make("td", null, className));
  td.dataset.label = label;
  return td.appendChild(make("div", text));
}

// An empty table with these heads: `box` goes into the page, rows into `body`.
export function table(label, heads) {
  const box = make("div", null, "wide");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  const inner = box.appendChild(make("table"));
  const row = inner.appendChild(make("thead")).appendChild(make("tr"));
  for (const head of heads) row.appendChild(make("th", head)).scope = "col";
  return { box, body: inner.appendChild(make("tbody")) };
}

// What a page shows while there is nothing: a sentence that says what to do next, and commands to copy.
export function empty(text, commands) {
  const box = make("div", null, "empty");
  box.append(make("p", text));
  if (commands) box.append(make("pre", commands));
  return box;
}

// A button that changes something: disabled, with the reason, for who may only look.
export function writeButton(text, act, className) {
  const button = make("button", text, className);
  button.type = "button";
  if (canWrite()) button.addEventListener("click", act);
  else { button.disabled = true; button.title = READ_ONLY; }
  return button;
}

// A reply of the router; an Error with its message otherwise. `signal`: of an AbortController.
export async function send(method, path, body, signal) {
  const headers = { accept: "application/json" };
  if (method !== "GET") {
    headers["content-type"] = "application/json";
    if (session.csrf) headers["x-csrf-token"] = session.csrf;
  }
  let reply;
  try {
    reply = await fetch(path, {
      method, headers, signal, body: method === "GET" ? undefined : JSON.stringify(body ?? {}),
      credentials: "same-origin", cache: "no-store", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The router does not answer; is it running, and is the network up?");
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => null);
  const error = new Error(said?.error?.message || `The router answered with status ${reply.status}.`);
  error.status = reply.status;
  error.code = said?.error?.code;
  error.param = said?.error?.param; // the member that is wrong
  if (reply.status === 401 && session.role) document.dispatchEvent(new CustomEvent("signed-out", { detail: error.message }));
  throw error;
}

export async function api(method, path, body, signal) {
  const reply = await send(method, path, body, signal);
  return reply.status === 204 ? null : reply.json();
}

let answered = null; // of the question that was asked last

// Asks before something is done; the focus goes back to where it was. True when `verb` was chosen.
export function confirmed(question, detail, verb) {
  const dialog = byId("dialog");
  const answer = () => { answered?.(dialog.returnValue === "yes"); answered = null; };
  answer(); // a browser says that a dialog was closed with its next frame only
  dialog.onclose = () => { if (!dialog.open) answer(); };
  byId("dialog-question").textContent = question;
  byId("dialog-detail").textContent = detail || "";
  byId("dialog-yes").textContent = verb;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => { answered = resolve; });
}

let clearing;

// A line that is read out when there is time; `tone`: good, warn or bad. A bad one stays until the next.
export function notice(text, tone = "good") {
  const line = byId("notice");
  clearTimeout(clearing);
  line.textContent = text;
  line.className = tone;
  if (text && tone !== "bad") clearing = setTimeout(() => { line.textContent = ""; }, 8000);
}
