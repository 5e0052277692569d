// Puts what the server sends where it belongs. A part arrives when it changes, whole; a pulse says
// that the server is alive. While nobody sees the page, nothing is asked for.
const SILENT = 15000;
const link = document.getElementById("link");
let source;
let heard = 0;

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).id.split("-")[1];

const say = (text, lost) => {
  if (link.textContent !== text) link.textContent = text;
  link.classList.toggle("lost", lost);
  document.body.classList.toggle("stale", lost);
};

const alive = () => {
  heard = Date.now();
  say("live", false);
};

// what the reader did to a part outlives its contents: what is open, how far it is scrolled, where
// the focus is
const replace = (part, html) => {
  const all = (selector) => [...part.querySelectorAll(selector)];
  const open = all("details").map((one) => one.open);
  const scrolled = all(".scroll").map((one) => one.scrollLeft);
  const focus = all("summary").indexOf(document.activeElement);
  part.innerHTML = html;
  if (open.length) all("details").forEach((one, i) => { if (i in open) one.open = open[i]; });
  all(".scroll").forEach((one, i) => { one.scrollLeft = scrolled[i] ?? 0; });
  if (focus >= 0) all("summary")[focus]?.focus({ preventScroll: true });
};

const connect = () => {
  source?.close();
  heard = Date.now();
  source = new EventSource(`events?by=${chosen("by")}&y=${chosen("y")}`);
  source.addEventListener("part", (event) => {
    const { id, html } = JSON.parse(event.data);
    replace(document.getElementById(id), html);
    document.title = document.querySelector("[data-title]")?.dataset.title ?? document.title;
    alive();
  });
  source.addEventListener("pulse", alive);
  source.onerror = () => say("no connection to the dashboard; trying again", true);
};

setInterval(() => {
  const lost = source.readyState === EventSource.CLOSED || Date.now() - heard > SILENT;
  if (lost && !document.hidden) {
    say("no connection to the dashboard; trying again", true);
    connect();
  }
}, 3000);
document.addEventListener("visibilitychange", () => (document.hidden ? source.close() : connect()));
document.querySelectorAll("input").forEach((one) => one.addEventListener("change", connect));
connect();
