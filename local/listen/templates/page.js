"use strict";

const all = (selector, parent = document) => [...parent.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);

/* The overview: tables that sort, a filter by name, a choice of the target. */

function sortTables(column, sign) {
  const valueOf = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    if (column === 0) return sign * valueOf(a).localeCompare(valueOf(b));
    const [x, y] = [a, b].map((row) => parseFloat(valueOf(row)));
    return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y); // no score: at the end
  };
  for (const part of all(".sortable tbody")) part.append(...[...part.rows].sort(compare));
  const order = sign === 1 ? "ascending" : "descending";
  for (const th of all(".sortable thead th")) th.ariaSort = th.cellIndex === column ? order : null;
}

/* Return the sorting, kept until the tab is closed; some browsers have no storage for files. */
function keepSorting(...sorting) {
  try {
    if (sorting.length) sessionStorage.setItem(location.pathname, sorting);
    return sessionStorage.getItem(location.pathname).split(",").map(Number);
  } catch {
    return sorting;
  }
}

function filterTracks() {
  const wanted = one("#filter").value.trim().toLocaleLowerCase();
  for (const row of all(".sortable tbody tr")) {
    row.hidden = !row.cells[0].textContent.toLocaleLowerCase().includes(wanted);
  }
  const rows = all("[data-target='1'] tbody tr");
  const shown = rows.filter((row) => !row.hidden).length;
  one("#count").value = wanted ? `${shown} of ${rows.length} tracks` : "";
}

function chooseTarget() {
  const chosen = one("#choose-target select").value;
  for (const table of all("[data-target]")) table.hidden = table.dataset.target !== chosen;
}

function startOverview() {
  for (const heading of all(".sortable th:has(button)")) {
    const sign = () => (heading.ariaSort === "ascending" ? -1 : 1);
    heading.onclick = () => sortTables(...keepSorting(heading.cellIndex, sign()));
  }
  one(".bar").onsubmit = (event) => event.preventDefault();
  one("#filter").oninput = filterTracks;
  one("#choose-target").hidden = false;
  one("#choose-target select").onchange = chooseTarget;
  filterTracks();
  chooseTarget();
  const [column, sign] = keepSorting();
  if (one(".sortable tr").cells[column]) sortTables(column, sign);
}

/* A track: all players run together, and one of them is heard. */

const FADE = 30; // ms, of a switch
const SILENT = 1e-5; // at 0 Chromium plays to another clock, and would jump when it is heard
const FAR = 0.3; // s: a player this far off jumps; one that is nearer changes its speed for a moment
const NEAR = 0.005; // s: this near is well enough
const PULSE = 150; // ms

class Players {
  constructor(lanes) {
    this.start = parseFloat(lanes.dataset.start);
    this.seconds = parseFloat(lanes.dataset.seconds);
    this.last = parseFloat(lanes.dataset.last); // s: see audio.py
    this.passage = parseFloat(lanes.dataset.passage);
    this.choices = all("input[name=player]");
    this.audio = all("audio");
    this.heard = Math.max(0, this.choices.findIndex((choice) => choice.checked));
    this.position = 0; // s, while nothing plays
    this.isPlaying = false;
    this.tick = 0;
    this.corrected = new Map(); // player -> when to look at it again, in ms
    this.loop = null; // where it begins and ends, in s
    for (const player of this.audio) player.preservesPitch = false;
    this.setVolumes();
    this.show();
  }

  get time() {
    return this.timer ? this.audio[this.heard].currentTime : this.position;
  }

  gain(number) {
    return one("#matched").checked ? 10 ** (this.choices[number].dataset.gain / 20) : 1;
  }

  setVolumes() {
    this.audio.forEach((player, i) => (player.volume = i === this.heard ? this.gain(i) : SILENT));
  }

  seek(time) {
    this.position = Math.max(0, Math.min(time, this.last));
    for (const player of this.audio) {
      player.playbackRate = 1;
      if (player.readyState) player.currentTime = this.position;
      else if (!this.isPlaying) player.preload = "auto";
    }
    this.show();
  }

  async play() {
    if (this.isPlaying) return;
    this.isPlaying = true;
    this.show();
    try {
      await Promise.all(this.audio.map(ready));
      this.seek(this.isInLoop(this.position) ? this.position : this.loop[0]);
      await Promise.all(this.audio.map(settled));
      if (!this.isPlaying) return;
      await Promise.all(this.audio.map((player) => player.play()));
      this.timer ??= setInterval(() => this.keepTogether(), 20);
    } catch (error) {
      if (!this.isPlaying) return; // it was paused meanwhile
      this.pause();
      if (error.name === "NotAllowedError") return; // the browser wants a click first
      one("#fault").textContent = `The audio cannot be played: ${error.message}`;
    }
  }

  pause() {
    this.position = this.time;
    this.isPlaying = false;
    clearInterval(this.timer);
    this.timer = undefined;
    for (const player of this.audio) player.pause();
    this.seek(this.position);
  }

  /* While playing: bring the silent players to where the heard one is. */
  keepTogether() {
    const leader = this.audio[this.heard];
    this.position = leader.currentTime;
    if (leader.ended || this.position >= (this.loop?.[1] ?? this.seconds)) {
      if (leader.ended || !this.loop) this.pause();
      this.seek(this.loop?.[0] ?? 0);
      return this.loop && this.play(); // it may have stopped
    }
    for (const player of this.audio) {
      const late = leader.currentTime - player.currentTime;
      if (player === leader || player.seeking || player.ended) continue;
      if (Math.abs(late) > FAR) player.currentTime = Math.min(leader.currentTime, this.last);
      else if (Math.abs(late) > NEAR) this.correct(player, late);
    }
    if (!(this.tick = (this.tick + 1) % 5)) this.show();
  }

  /* Change the speed of a silent player for PULSE, and look at it again when that has had its
     effect: what was buffered before is played at the old speed. */
  correct(player, late) {
    const now = performance.now();
    if (now < (this.corrected.get(player) ?? 0)) return;
    this.corrected.set(player, now + 3 * PULSE);
    player.playbackRate = 1 + Math.min(Math.max((1000 * late) / PULSE, -0.4), 0.4);
    setTimeout(() => (player.playbackRate = 1), PULSE);
  }

  choose(number) {
    if (!this.choices[number]) return;
    this.choices[number].checked = true;
    const before = this.heard;
    if (number === before) return;
    this.position = this.time;
    this.heard = number;
    this.audio[number].playbackRate = 1;
    this.fade(before, number);
  }

  /* A sudden change of volume would click. */
  fade(from, to) {
    const began = performance.now();
    const step = () => {
      const part = Math.min((performance.now() - began) / FADE, 1);
      if (this.heard !== to || part === 1) return this.setVolumes();
      this.audio[from].volume = Math.max((1 - part) * this.gain(from), SILENT);
      this.audio[to].volume = Math.max(part * this.gain(to), SILENT);
      setTimeout(step, 4);
    };
    step();
  }

  playFrom(time, number = this.heard) {
    this.choose(number);
    if (!this.isInLoop(time)) this.setLoop(time);
    this.seek(time);
    this.play();
  }

  isInLoop(time) {
    return !this.loop || (time >= this.loop[0] && time < this.loop[1]);
  }

  setLoop(time) {
    const start = Math.max(0, Math.min(time, this.seconds - this.passage));
    this.loop = time === null ? null : [start, Math.min(start + this.passage, this.seconds)];
    this.show();
  }

  show() {
    const time = this.time;
    one("#lanes").style.setProperty("--progress", time / this.seconds);
    one("#seek").value = time;
    one("#seek").ariaValueText = clock(this.start + time);
    const end = this.start + (this.loop ? this.loop[1] : this.seconds);
    const loop = this.loop ? `loop ${clock(this.start + this.loop[0])}–` : "";
    one("#time").textContent = `${clock(this.start + time)} / ${loop}${clock(end)}`;
    one("#play").textContent = this.isPlaying ? "Pause" : "Play";
    one("#loop").ariaPressed = this.loop !== null;
  }
}

function clock(time) {
  const tenths = Math.round(10 * time);
  return `${Math.floor(tenths / 600)}:${((tenths % 600) / 10).toFixed(1).padStart(4, "0")}`;
}

function ready(player) {
  if (player.error) return Promise.reject(new Error(player.error.message || player.src));
  if (player.readyState >= HTMLMediaElement.HAVE_FUTURE_DATA) return null;
  return new Promise((resolve, reject) => {
    player.addEventListener("canplay", resolve, { once: true });
    player.addEventListener("error", () => reject(new Error(player.error.message)), { once: true });
    player.preload = "auto";
    if (player.networkState !== HTMLMediaElement.NETWORK_LOADING) player.load();
  });
}

function settled(player) {
  return player.seeking && new Promise((resolve) => player.addEventListener("seeked", resolve, { once: true }));
}

let isByKeyboard = false; // what has the focus got it by Tab, not by a click

function pressKey(players, event) {
  if (event.key === "Tab") isByKeyboard = true;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === " " && isByKeyboard && event.target.matches("button, [type=checkbox]")) return;
  const actions = {
    " ": () => one("#play").click(),
    ArrowLeft: () => players.seek(players.time - players.passage),
    ArrowRight: () => players.seek(players.time + players.passage),
    ArrowUp: () => players.choose(players.heard - 1),
    ArrowDown: () => players.choose(players.heard + 1),
    l: () => one("#loop").click(),
  };
  if (event.key >= "1" && event.key <= "9") actions[event.key] = () => players.choose(event.key - 1);
  const action = actions[event.key] ?? actions[event.key.toLowerCase()];
  if (action) event.preventDefault();
  action?.();
}

/* #t=35&p=2: player 2 at 0:35; with &loop it plays and repeats. */
function followHash(players) {
  const found = new URLSearchParams(location.hash.slice(1));
  if (!found.has("t")) return;
  const time = Math.max(0, parseFloat(found.get("t")) - players.start || 0);
  const number = found.has("p") ? parseInt(found.get("p")) - 1 : players.heard;
  if (found.has("loop")) players.setLoop(time);
  if (found.has("loop") || players.isPlaying) return players.playFrom(time, number);
  players.choose(number);
  players.seek(time);
}

function startTrack(lanes) {
  const players = new Players(lanes);
  one("#play").onclick = () => (players.isPlaying ? players.pause() : players.play());
  one("#loop").onclick = () => players.setLoop(players.loop ? null : players.time);
  one("#matched").onchange = () => players.setVolumes();
  one("#seek").oninput = (event) => players.seek(parseFloat(event.target.value));
  players.choices.forEach((choice, i) => (choice.onchange = () => players.choose(i)));
  for (const plot of all(".plot", lanes)) {
    plot.onclick = (event) => {
      const box = plot.getBoundingClientRect();
      const time = ((event.clientX - box.left) / box.width) * players.seconds;
      players.playFrom(time, (plot.dataset.player ?? players.heard + 1) - 1);
    };
  }
  for (const link of all(".passage")) {
    link.onclick = (event) => {
      event.preventDefault();
      history.replaceState(null, "", link.href);
      followHash(players);
    };
  }
  document.addEventListener("keydown", (event) => pressKey(players, event));
  document.addEventListener("pointerdown", () => (isByKeyboard = false));
  window.addEventListener("hashchange", () => followHash(players));
  followHash(players);
}

if (one("#controls")) startTrack(one("#lanes"));
if (one("#filter")) startOverview();
