// Signing in, the pages by their hash, and the stream of snapshots that keeps them live.
import { api, make, notice, READ_ONLY, session } from "/dashboard/core.js";

const byId = (id) => document.getElementById(id);
// The module of each page; with an id behind it, `#/agents` is one agent's.
const PAGES = { agents: "agents", join: "join", models: "models", keys: "keys", try: "chat" };
const SILENT_MS = 40000; // the router says something every 15 s
const RETRY_MS = [1000, 2000, 5000, 10000];

let page = null; // {update, close} of what is shown
let showing = 0; // counts, so that a module that comes late does not replace a newer page
let last = null; // the last snapshot
let source = null;
let lost = 0;
let timer;

function link(text, tone) {
  byId("link").textContent = text;
  byId("link").className = tone;
}

function leave() {
  showing += 1;
  try { page?.close?.(); } finally { page = null; }
}

function update() {
  if (page && last) page.update?.(last);
}

async function route() {
  if (!session.role) return;
  const [name, id] = location.hash.replace(/^#\//, "").split("/");
  if (name === "login") { await start(); return; }
  if (!Object.hasOwn(PAGES, name)) { location.replace("#/agents"); return; }
  for (const a of byId("nav").querySelectorAll("a")) {
    if (a.hash === `#/${name}`) a.setAttribute("aria-current", id ? "true" : "page");
    else a.removeAttribute("aria-current");
  }
  leave();
  const mine = showing;
  const main = byId("main");
  try {
    const module = await import(`/dashboard/${name === "agents" && id ? "agent" : PAGES[name]}.js`);
    if (mine !== showing) return;
    main.replaceChildren();
    document.title = `${module.title} · XIM router`;
    notice("");
    page = module.show(main, id ? decodeURIComponent(id) : undefined);
    update();
  } catch (error) {
    if (mine !== showing) return;
    main.replaceChildren(make("h1", "This page cannot be shown"), make("p", String(error.message || error)));
  }
}

function disconnect() {
  clearTimeout(timer);
  source?.close();
  source = null;
}

function connect() {
  disconnect();
  if (!session.role || document.hidden) return; // a browser has few connections for one router: hidden tabs take none
  const mine = new EventSource("/dashboard/events");
  source = mine;
  timer = setTimeout(retry, SILENT_MS);
  mine.onmessage = (event) => {
    clearTimeout(timer);
    timer = setTimeout(retry, SILENT_MS);
    lost = 0;
    last = JSON.parse(event.data);
    session.offset = last.time - Date.now() / 1000;
    link("live", "good");
    update();
  };
  mine.onerror = retry;
}

async function retry() {
  disconnect();
  link("connection lost, retrying", "bad");
  const wait = RETRY_MS[Math.min(lost, RETRY_MS.length - 1)];
  lost += 1;
  try {
    await api("GET", "/dashboard/api/session"); // a session that ended shows the way to a new one
  } catch (error) {
    if (error.status === 401) return;
  }
  if (session.role && source === null) {
    clearTimeout(timer);
    timer = setTimeout(connect, wait);
  }
}

function banner(text, tone) {
  byId("banners").append(make("p", text, `banner ${tone}`));
}

function signedIn(found) {
  Object.assign(session, { role: found.role, csrf: found.csrf });
  byId("nav").hidden = byId("sign-out").hidden = false;
  byId("banners").replaceChildren();
  if (found.role !== "admin") banner(READ_ONLY, "warn");
  if (found.insecure) {
    banner("You came over plain http from another machine: whoever is on the way can read and change all of this."
      + " Use TLS or `ssh -L`, see README.", "bad");
  }
}

function signedOut(why) {
  Object.assign(session, { role: null, csrf: null });
  disconnect();
  leave();
  last = null;
  byId("nav").hidden = byId("sign-out").hidden = true;
  byId("banners").replaceChildren();
  link("", "");
  notice("");
  document.title = "Sign in · XIM router";
  const main = byId("main");
  main.replaceChildren(make("h1", "Sign in"));
  if (why) main.append(make("p", why, "bad"));
  const box = main.appendChild(make("div", null, "empty"));
  box.append(
    make("p", "This dashboard opens by a link that works once. The router prints one when it starts; this makes another,"
      + " on the router's machine:"),
    make("pre", "xerotier-xim-agent router admin-link --data DIR"),
    make("p", "Add --read-only for a link that lets somebody look and change nothing."),
  );
}

async function start() {
  const [name, token] = location.hash.replace(/^#\//, "").split("/");
  let why = "";
  if (name === "login") {
    history.replaceState(null, "", "#/agents"); // it is of no use any more, so it need not stay in the history
    try {
      await api("POST", "/dashboard/api/login", { token: token || "" });
    } catch (error) {
      why = error.message;
    }
  }
  try {
    signedIn(await api("GET", "/dashboard/api/session"));
  } catch (error) {
    signedOut(why || (error.status === 401 ? "" : error.message));
    return;
  }
  await route();
  if (why) notice(`${why} You are signed in already.`, "warn");
  connect();
}

byId("sign-out").addEventListener("click", async () => {
  try {
    await api("POST", "/dashboard/api/logout");
    signedOut("");
  } catch (error) {
    notice(error.message, "bad");
  }
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the page
  byId("main").focus();
});
document.addEventListener("signed-out", (event) => signedOut(event.detail));
document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
window.addEventListener("hashchange", async () => {
  if (!session.role) { await start(); return; }
  await route();
  byId("main").focus(); // what was chosen is read out, and Tab goes on from there
  scrollTo(0, 0);
});
await start();
