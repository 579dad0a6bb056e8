// The login page: a name and a password, once.

import { byId, plain } from "./dom.js";
import { request } from "./server.js";

byId("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  byId("remark").textContent = "";
  try {
    await request("POST", "/login", { handle: byId("handle").value, password: byId("password").value });
    location.assign("/");
  } catch (error) {
    byId("remark").textContent = plain(error.message, 300);
    byId("password").value = "";
    byId("password").focus();
  } finally {
    button.disabled = false;
  }
});
